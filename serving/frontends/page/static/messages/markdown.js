// Markdown to nodes: what models write (CommonMark's blocks, GitHub's tables), made from text alone. TeX is left as it stands.
import { button, copy, el } from "/static/dom.js";

const DEEPEST = 12; // lists in quotes in lists: beyond, text stays text
const LONGEST = 20_000; // characters of one paragraph that are looked at for emphasis
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*?)\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:\s+(.*)|$)/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const DELIMITERS = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH = /^\s*(\$\$|\\\[)/;

/** A fragment for a text. */
export function markdown(text) {
  const out = document.createDocumentFragment();
  out.append(...blocks(text.split("\n"), 0));
  return out;
}

function blocks(lines, depth) {
  const out = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i];
    let found;
    if (!line.trim()) i += 1;
    else if (depth >= DEEPEST) { out.push(el("p", { text: lines.slice(i).join("\n") })); break; }
    else if ((found = line.match(FENCE))) [i, found] = fence(lines, i, found, out);
    else if (MATH.test(line)) i = math(lines, i, out);
    else if ((found = line.match(HEADING))) { out.push(el(`h${Math.min(6, found[1].length + 2)}`, {}, ...inline(found[2]))); i += 1; }
    else if (RULE.test(line)) { out.push(el("hr")); i += 1; }
    else if (/^ {0,3}>/.test(line)) {
      const from = i;
      while (i < lines.length && /^ {0,3}>/.test(lines[i])) i += 1;
      out.push(el("blockquote", {}, ...blocks(lines.slice(from, i).map((one) => one.replace(/^ {0,3}> ?/, "")), depth + 1)));
    } else if (ITEM.test(line)) i = list(lines, i, depth, out);
    else if (line.includes("|") && DELIMITERS.test(lines[i + 1] ?? "") && lines[i + 1].includes("-")) i = table(lines, i, out);
    else i = paragraph(lines, i, out);
  }
  return out;
}

function fence(lines, i, found, out) {
  const closing = new RegExp(`^ {0,3}${found[1][0]}{${found[1].length},}\\s*$`);
  let end = i + 1;
  while (end < lines.length && !closing.test(lines[end])) end += 1;
  out.push(code(lines.slice(i + 1, end).join("\n") + (end > i + 1 ? "\n" : ""), found[2].split(/\s/)[0]));
  return [end + 1, null];
}

/** A block of code with its language and a button that copies it. */
export function code(text, language = "") {
  const copies = button("Copy", "Copy this code", (event) => copy(text, event.currentTarget), { class: "copy" });
  const head = el("div", { class: "head" }, el("span", { text: language || "text" }), copies);
  return el("div", { class: "code" }, head, el("pre", { tabindex: "0" }, el("code", { text })));
}

function math(lines, i, out) {
  const closing = lines[i].trim().startsWith("$$") ? "$$" : "\\]";
  let end = i;
  const ends = (n) => lines[n].trim().slice(n === i ? 2 : 0).endsWith(closing);
  while (end < lines.length && lines[end].trim() && !ends(end)) end += 1;
  const last = Math.min(end, lines.length - 1);
  out.push(el("pre", { class: "math", text: lines.slice(i, last + 1).join("\n") }));
  return last + 1;
}

function list(lines, i, depth, out) {
  const [, indent, mark] = lines[i].match(ITEM);
  const ordered = /\d/.test(mark);
  const node = el(ordered ? "ol" : "ul", ordered && mark.slice(0, -1) !== "1" ? { start: mark.slice(0, -1) } : {});
  while (i < lines.length) {
    const found = lines[i].match(ITEM);
    if (!found || found[1].length > indent.length + 3 || found[1].length < indent.length || /\d/.test(found[2]) !== ordered) break;
    const width = lines[i].length - (found[3] ?? "").length;
    const own = [found[3] ?? ""];
    i += 1;
    while (i < lines.length) {
      const blank = !lines[i].trim();
      const next = blank ? lines[i + 1] ?? "" : lines[i];
      const deeper = next.search(/\S/) > indent.length;
      if (blank ? !deeper : !deeper && (ITEM.test(next) || HEADING.test(next) || FENCE.test(next) || RULE.test(next) || !own.at(-1).trim())) break;
      own.push(lines[i].slice(Math.min(width, Math.max(0, lines[i].search(/\S/)))));
      i += 1;
    }
    const task = own[0].match(/^\[([ xX])\]\s+(.*)$/);
    if (task) own[0] = task[2];
    const tick = task && el("input", { type: "checkbox", disabled: true, checked: task[1] !== " ", "aria-label": "done" });
    const inside = blocks(own, depth + 1);
    const tight = inside[0]?.tagName === "P" ? [...inside.shift().childNodes] : [];
    node.append(el("li", {}, tick, ...tight, ...inside));
    if (i < lines.length && !lines[i].trim() && ITEM.test(lines[i + 1] ?? "")) i += 1;
  }
  out.push(node);
  return i;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));

function table(lines, i, out) {
  const head = cells(lines[i]);
  const sides = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : undefined));
  const row = (line, tag) => el("tr", {}, ...head.map((_, n) => el(tag, { class: sides[n] }, ...inline(line[n] ?? ""))));
  const body = el("tbody");
  const node = el("table", {}, el("thead", {}, row(head, "th")), body);
  for (i += 2; i < lines.length && lines[i].includes("|") && lines[i].trim(); i += 1) body.append(row(cells(lines[i]), "td"));
  out.push(el("div", { class: "table", tabindex: "0" }, node));
  return i;
}

function paragraph(lines, i, out) {
  const from = i;
  i += 1;
  const ends = (line, next) => !line.trim() || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line)
    || ITEM.test(line) || MATH.test(line) || (line.includes("|") && DELIMITERS.test(next ?? ""));
  while (i < lines.length && !ends(lines[i], lines[i + 1])) i += 1;
  out.push(el("p", {}, ...inline(lines.slice(from, i).join("\n").trim())));
  return i;
}

const INLINE = new RegExp([
  /(?<ticks>`+)(?<code>[\s\S]*?[^`])\k<ticks>(?!`)/,
  /\\\((?<tex>[\s\S]+?)\\\)|\$(?<dollar>(?!\s)[^$\n]+?(?<!\s))\$(?!\d)/,
  /\\(?<escaped>[\\`*_{}[\]()#+\-.!~|>$])/,
  /!?\[(?<label>[^\]\n]*)\]\(\s*<?(?<target>[^\s)>]+)>?(?:\s+"[^"\n]*")?\s*\)/,
  /(?<bare>\bhttps?:\/\/[^\s<>"')\]]*[^\s<>"')\].,;:!?])/,
  /\*\*(?<bold>(?=\S)[\s\S]*?\S)\*\*/,
  /(?<!\w)__(?<strong>(?=\S)[^_]*?\S)__(?!\w)/,
  /~~(?<gone>(?=\S)[\s\S]*?\S)~~/,
  /\*(?<slanted>[^\s*](?:[^*\n]*?[^\s*])?)\*(?!\*)/,
  /(?<![\w_])_(?<em>[^\s_](?:[^_\n]*?[^\s_])?)_(?![\w_])/,
].map((one) => one.source).join("|"), "g");

/** Nodes and strings of a line of text; line breaks are kept. */
function* inline(text, depth = 0) {
  if (text.length > LONGEST || depth >= DEEPEST) { yield text; return; }
  let last = 0;
  for (const found of text.matchAll(INLINE)) {
    if (found.index > last) yield* broken(text.slice(last, found.index));
    last = found.index + found[0].length;
    const g = found.groups;
    const bold = g.bold ?? g.strong, slanted = g.slanted ?? g.em;
    if (g.code !== undefined) yield el("code", { text: g.code.replace(/^ (.+) $/, "$1") });
    else if (g.tex !== undefined || g.dollar !== undefined) yield el("span", { class: "math", text: found[0] });
    else if (g.escaped !== undefined) yield g.escaped;
    else if (g.target !== undefined) yield link(g.target, g.label, depth, found[0]);
    else if (g.bare !== undefined) yield link(g.bare, g.bare, DEEPEST, found[0]);
    else if (bold !== undefined) yield el("strong", {}, ...inline(bold, depth + 1));
    else if (g.gone !== undefined) yield el("s", {}, ...inline(g.gone, depth + 1));
    else if (slanted !== undefined) yield el("em", {}, ...inline(slanted, depth + 1));
  }
  if (last < text.length) yield* broken(text.slice(last));
}

function* broken(text) {
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; i += 1) {
    if (i) yield el("br");
    if (lines[i]) yield lines[i].replace(/ {2,}$/, "");
  }
}

/** A link, where it leads to a web page or a mailbox; anything else stays text. Images too: the page loads nothing from elsewhere. */
function link(target, label, depth, whole) {
  if (!/^(https?:\/\/|mailto:)/i.test(target)) return whole;
  return el("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, ...inline(label || target, depth + 1));
}
