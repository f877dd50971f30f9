// What goes with the next message: images and sound as they are, texts and code, PDF by the server. Texts become a part of the
// message, each with how many tokens it has; images and sound are parts of their own.
import { $, button, el } from "/static/dom.js";
import { countTokens, pdfText } from "/static/api.js";
import { image, isImage } from "/static/attachments/images.js";
import { isSound, sound } from "/static/attachments/sound.js";
import { shown } from "/static/messages/media.js";

const LARGEST_TEXT = 1024 * 1024; // bytes
const SAMPLE = 64 * 1024; // bytes that are looked at to tell texts from other files

export class Attachments {
  /** `model` gives the model whose tokens are counted, `refuses(kind)` why no model is sent an "image" or "audio" ("" where one is), `fail` shows a sentence. */
  constructor(model, refuses, fail) {
    this.model = model;
    this.refuses = refuses;
    this.fail = fail;
    this.files = []; // {name, reading}, and once that is done {name, text, tokens} or {name, kind, url}
    this.list = $("#files");
  }

  /** Takes its place at once, so files stand in the order in which they were given, however long each takes to read. */
  async add(file) {
    const one = { name: file.name };
    one.reading = this.fill(one, file);
    this.files.push(one);
    this.draw();
    await one.reading;
  }

  /** Whether it could be read. */
  async fill(one, file) {
    try {
      Object.assign(one, await this.read(file));
    } catch (error) {
      this.leave(one);
      this.fail(`${file.name}: ${error.message}`);
      return false;
    } finally {
      one.reading = null;
    }
    this.draw();
    if (!one.kind) this.count(one); // which nobody waits for
    return true;
  }

  async count(one) {
    try { one.tokens = await countTokens(this.model(), wrapped(one)); } catch { one.tokens = NaN; }
    this.draw();
  }

  /** A promise of whether each file that is being read could be; null where none is. */
  get reading() {
    const waiting = this.files.map((file) => file.reading).filter(Boolean);
    return waiting.length ? Promise.all(waiting) : null;
  }

  leave(one) {
    this.files = this.files.filter((other) => other !== one);
    this.draw();
  }

  async read(file) {
    const kind = isImage(file) ? "image" : isSound(file) ? "audio" : "";
    if (kind) {
      const why = this.refuses(kind);
      if (why) throw new Error(why);
      return { kind, name: file.name, url: await (kind === "image" ? image(file) : sound(file)) };
    }
    const text = await textOf(file);
    if (!text.trim()) throw new Error("it has no text.");
    return { name: file.name, text: text.trimEnd(), tokens: null };
  }

  draw() {
    this.list.hidden = !this.files.length;
    this.list.replaceChildren(...this.files.map((file) => el("li", { class: file.kind },
      file.kind && shown(file),
      el("span", { class: "name", text: file.name }),
      el("span", { class: "soft", text: tokens(file) }),
      button("✕", `Leave ${file.name} out`, () => { this.leave(file); $("#prompt").focus(); }))));
  }

  /** A message with the texts in front of it, and its images and sound; there are none afterwards. Nothing is being read. */
  take(text) {
    const content = [...this.files.filter((file) => !file.kind).map(wrapped), text].filter(Boolean).join("\n\n");
    const media = this.files.filter((file) => file.kind);
    this.files = [];
    this.draw();
    return { content, media };
  }
}

function tokens(file) {
  if (file.reading) return "reading…";
  if (file.kind || Number.isNaN(file.tokens)) return "";
  return file.tokens === null ? "counting…" : `${file.tokens.toLocaleString("en")} tokens`;
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
  if (bytes.subarray(0, SAMPLE).includes(0)) throw new Error("it is neither a text, a PDF, an image nor sound.");
  return new TextDecoder().decode(bytes);
}
