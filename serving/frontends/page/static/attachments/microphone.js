// The button that records: what was said goes with the message where a chosen model hears; where another model of the server writes
// down what is said, its words go into the message.
import { transcribe } from "/static/api.js";
import { canRecord, record, sound } from "/static/attachments/sound.js";
import { blobOf } from "/static/attachments/urls.js";
import { $, say } from "/static/dom.js";

export class Microphone {
  /** `page` has hears() whether a chosen model does, writer() the name of one that transcribes, attach(file), dictate(words), fail(text). */
  constructor(page) {
    this.page = page;
    this.button = $("#record");
    this.end = null; // ends the recording that runs
    this.button.addEventListener("click", () => this.press());
  }

  /** Shown where somebody is there to hear. */
  show() { this.button.hidden = !canRecord() || !(this.page.hears() || this.page.writer()); }

  async press() {
    this.button.disabled = true; // until the browser has asked its reader, or the words are there
    try {
      if (this.end) await this.finish(); else await this.begin();
    } catch (error) {
      this.page.fail(error.message);
    }
    this.button.disabled = false;
  }

  async begin() {
    this.page.fail("");
    this.end = await record();
    this.mark(true);
    say("Recording.");
  }

  async finish() {
    const end = this.end;
    this.end = null;
    this.mark(false);
    const file = await end();
    if (this.page.hears()) { await this.page.attach(file); say("Recorded."); return; }
    this.page.dictate((await transcribe(this.page.writer(), blobOf(await sound(file)))).trim());
  }

  mark(on) {
    const label = on ? "End the recording" : "Record from the microphone";
    this.button.setAttribute("aria-pressed", String(on));
    this.button.setAttribute("aria-label", label);
    this.button.title = label;
  }
}
