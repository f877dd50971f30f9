// Files that go with the next message: texts and code as they are, PDF by the server, each with how many tokens it has.
import { $, button, el } from "/static/dom.js";
import { countTokens, pdfText } from "/static/api.js";

const LARGEST_TEXT = 1024 * 1024; // bytes
const SAMPLE = 64 * 1024; // bytes that are looked at to tell texts from other files

export class Attachments {
  /** `model` gives the model whose tokens are counted, `fail` shows a sentence. */
  constructor(model, fail) {
    this.model = model;
    this.fail = fail;
    this.files = [];
    this.list = $("#files");
  }

  get names() { return this.files.map((file) => file.name); }

  async add(file) {
    let text;
    try { text = await textOf(file); } catch (error) { this.fail(`${file.name}: ${error.message}`); return; }
    if (!text.trim()) { this.fail(`${file.name} has no text.`); return; }
    const one = { name: file.name, text: text.trimEnd(), tokens: null };
    this.files.push(one);
    this.draw();
    try { one.tokens = await countTokens(this.model(), wrapped(one)); } catch { one.tokens = NaN; }
    this.draw();
  }

  draw() {
    this.list.hidden = !this.files.length;
    this.list.replaceChildren(...this.files.map((file) => el("li", {},
      el("span", { text: file.name }),
      el("span", { class: "soft", text: file.tokens === null ? "counting…" : Number.isNaN(file.tokens) ? "" : `${file.tokens.toLocaleString("en")} tokens` }),
      button("✕", `Leave ${file.name} out`, () => { this.files.splice(this.files.indexOf(file), 1); this.draw(); }))));
  }

  /** A message with the files in front of it; there are none afterwards. */
  take(text) {
    const parts = [...this.files.map(wrapped), text].filter(Boolean);
    this.files = [];
    this.draw();
    return parts.join("\n\n");
  }
}

/** A fence that the text has none of. */
function wrapped({ name, text }) {
  const longest = Math.max(2, ...[...text.matchAll(/`+/g)].map((found) => found[0].length));
  const fence = "`".repeat(longest + 1);
  return `${name}:\n${fence}\n${text}\n${fence}`;
}

async function textOf(file) {
  if (file.type === "application/pdf" || file.name.toLowerCase().endsWith(".pdf")) return (await pdfText(file)).text;
  if (file.size > LARGEST_TEXT) throw new Error("it is larger than 1 MiB.");
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (bytes.subarray(0, SAMPLE).includes(0)) throw new Error("it is neither a text nor a PDF.");
  return new TextDecoder().decode(bytes);
}
