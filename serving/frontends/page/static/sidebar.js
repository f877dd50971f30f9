// The conversations kept in this browser: a list to go back to them, in and out as files.
import { $, button, download, el } from "/static/dom.js";
import { fromJson, titleOf, toJson } from "/static/conversation/conversation.js";
import { fromMarkdown, toMarkdown } from "/static/conversation/markdown_file.js";
import * as store from "/static/conversation/store.js";

const LARGEST = 50 * 2 ** 20; // bytes of a file that is imported

export class Sidebar {
  /** `page` has current (the conversation shown), open(conversation), fresh() and fail(text). */
  constructor(page) {
    this.page = page;
    this.list = $("#conversations");
    $("#export-json").addEventListener("click", async () => download("conversations.json", "application/json", toJson(await store.all())));
    $("#export-md").addEventListener("click", () => download("conversation.md", "text/markdown", toMarkdown(page.current)));
    const file = $("#import-file");
    $("#import").addEventListener("click", () => file.click());
    file.addEventListener("change", async () => {
      const [chosen] = file.files;
      file.value = "";
      if (chosen) await this.take(chosen);
    });
    const toggle = $("#menu");
    $("#menu-close").addEventListener("click", () => { this.show(false); toggle.focus(); });
    $("#chat").addEventListener("click", () => this.show(false));
    toggle.addEventListener("click", () => this.show(!document.body.classList.contains("menu-open")));
    document.addEventListener("keydown", (event) => { if (event.key === "Escape") this.show(false); });
  }

  show(open) {
    document.body.classList.toggle("menu-open", open);
    $("#menu").setAttribute("aria-expanded", String(open));
    if (open) $("#menu-close").focus();
  }

  async take(file) {
    try {
      if (file.size > LARGEST) throw new Error("The file is larger than 50 MiB.");
      const found = /\.(md|markdown)$/i.test(file.name) ? [fromMarkdown(await file.text())] : fromJson(await file.text());
      for (const one of found) await store.save(one);
      await this.draw();
      if (found.length) this.page.open(found[0]);
    } catch (error) { this.page.fail(error.message); }
  }

  async draw() {
    const turn = this.turn = (this.turn ?? 0) + 1;
    const all = await store.all();
    if (turn !== this.turn) return; // a later look has seen more
    this.list.replaceChildren(...all.map((one) => {
      const name = one.title || titleOf(one);
      const open = el("button", { type: "button", class: "open", "aria-current": one.id === this.page.current.id ? "true" : undefined, title: name, text: name, on: { click: () => { this.show(false); this.page.open(one); } } });
      const forget = button("✕", `Delete the conversation: ${name}`, async () => {
        await store.remove(one.id);
        if (one.id === this.page.current.id) this.page.fresh();
        await this.draw();
      });
      return el("li", {}, open, forget);
    }));
    $("#no-conversations").hidden = all.length > 0;
  }
}
