// Text to nodes: fenced code, inline code, bold. Text is only ever set as text, so a model cannot inject markup.

/** A fragment for an answer: its reasoning folded away, its text, its tool calls. */
export function render(text, reasoning = "", calls = []) {
  const out = document.createDocumentFragment();
  if (reasoning) {
    const details = element("details");
    details.append(element("summary", "reasoning"), reasoning);
    out.append(details);
  }
  const parts = text.split(/^```([^\n`]*)\n([\s\S]*?)(?:^```[ \t]*$\n?|$(?![\s\S]))/m);
  for (let i = 0; i < parts.length; i += 3) {
    const plain = parts[i].replace(i ? /^\n+/ : /^$/, "").replace(i + 2 < parts.length ? /\n+$/ : /^$/, ""); // a block has its own margins
    if (plain) out.append(...inline(plain));
    if (i + 2 < parts.length) {
      const pre = element("pre");
      pre.append(element("code", parts[i + 2]));
      out.append(pre);
    }
  }
  for (const call of calls.filter(Boolean)) {
    const pre = element("pre");
    pre.append(element("code", `${call.name}(${call.arguments})`));
    out.append(pre);
  }
  return out;
}

function* inline(text) {
  const pieces = text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/);
  for (const piece of pieces) {
    if (/^`[^`\n]+`$/.test(piece)) yield element("code", piece.slice(1, -1));
    else if (/^\*\*[^*\n]+\*\*$/.test(piece)) yield element("strong", piece.slice(2, -2));
    else if (piece) yield piece;
  }
}

function element(name, text) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  return node;
}
