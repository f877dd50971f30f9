// A pane: a conversation with its settings, and how an answer is asked for.
import { $, el, say } from "/static/dom.js";
import { chat, transcribe, transcribes } from "/static/api.js";
import { blobOf } from "/static/attachments/urls.js";
import { begin, isEmpty, kept, measure, take } from "/static/conversation/answer.js";
import { wire } from "/static/conversation/conversation.js";
import { MessageView } from "/static/messages/message.js";
import { Settings } from "/static/settings.js";

const SLOW_DRAW = 8; // drawing takes at most one part in so many of the time, however long the answer

export class Pane {
  /**
   * `host` is the page: run(work) runs work(signal) with Stop shown unless something runs already, changed(said) keeps the
   * conversation, branch(pane, messages) opens another, chosen() is told of another model, template(model) shows one, needsKey() asks for a key and says whether it got one.
   */
  constructor(cards, host) {
    this.host = host;
    this.root = $("#pane").content.firstElementChild.cloneNode(true);
    this.log = $(".log", this.root);
    this.stats = $(".stats", this.root);
    this.model = $(".model", this.root);
    this.cards = cards;
    for (const card of cards) this.model.add(new Option(card.parent ? `${card.id} (adapter)` : card.id, card.id));
    this.model.closest("label").hidden = cards.length < 2;
    this.settings = new Settings($(".settings", this.root), () => host.changed());
    this.model.addEventListener("change", () => { this.suggest(); host.changed(); });
    $(".template", this.root).addEventListener("click", () => host.template(this.model.value));
    const toggle = $(".toggle", this.root);
    toggle.addEventListener("click", () => {
      this.settings.root.hidden = !this.settings.root.hidden;
      toggle.setAttribute("aria-expanded", String(!this.settings.root.hidden));
    });
    this.load({ settings: {}, messages: [] });
  }

  /** What the server says of the pane's model. */
  get card() { return this.cards.find((card) => card.id === this.model.value); }

  suggest() {
    this.settings.suggest(this.card);
    this.host.chosen();
  }

  /** What is kept of it. */
  get state() { return { settings: { ...this.settings.values, model: this.model.value }, messages: this.messages }; }

  /** Shows a kept one. An answer that is still being written goes nowhere. */
  load(state) {
    this.epoch = {}; // what is asked for an earlier one does not compare equal
    this.messages = structuredClone(state.messages);
    if (this.cards.some((card) => card.id === state.settings.model)) this.model.value = state.settings.model;
    this.settings.values = state.settings;
    this.suggest();
    this.stats.textContent = "";
    this.redraw();
  }

  redraw() {
    const hint = el("p", { class: "empty", text: "Ask something. Conversations stay in this browser." });
    const does = {
      edit: (message, text) => this.host.run((signal) => { this.cut(message); return this.ask({ content: text, media: message.media }, signal); }),
      resend: (message) => this.host.run((signal) => { this.cut(message); return this.ask(message, signal); }),
      regenerate: (message) => this.host.run((signal) => { this.cut(message); return this.answer(signal); }),
      branch: (message) => this.host.branch(this, this.messages.slice(0, this.messages.indexOf(message) + 1)),
      remove: (message) => { if (!this.host.busy()) { this.messages.splice(this.messages.indexOf(message), 1); this.redraw(); this.host.changed(true); } },
      result: (message, call, text) => this.host.run((signal) => this.giveResult(message, call, text, signal)),
    };
    this.does = does;
    this.views = this.messages.map((message) => new MessageView(message, does));
    this.log.replaceChildren(...(this.views.length ? this.views.map((view) => view.root) : [hint]));
    this.log.scrollTop = this.log.scrollHeight;
  }

  /** Takes a message away, and all that follow. */
  cut(message) {
    this.messages.length = this.messages.indexOf(message);
    this.redraw();
  }

  add(message, does = this.does) {
    $(".empty", this.log)?.remove();
    const view = new MessageView(message, does);
    this.messages.push(message);
    this.views.push(view);
    this.log.append(view.root);
    this.log.scrollTop = this.log.scrollHeight;
    return view;
  }

  /** Says something and has it answered. Never rejects. */
  async ask({ content, media }, signal) {
    this.add({ role: "user", content, ...(media?.length ? { media } : {}) });
    await this.answer(signal);
  }

  /** What a tool gave; once every call of the message has its result, the model goes on. */
  async giveResult(message, call, text, signal) {
    call.answered = true;
    this.views[this.messages.indexOf(message)]?.draw();
    this.add({ role: "tool", id: call.id, content: text });
    this.host.changed(true);
    if (message.calls.every((one) => one.answered)) await this.answer(signal);
  }

  /** Asks for an answer to what was said so far, and writes it as it comes. Never rejects. */
  async answer(signal) {
    const epoch = this.epoch;
    if (transcribes(this.card)) { await this.transcribe(signal, epoch); return; }
    let body;
    try {
      body = { model: this.model.value, messages: wire(this.messages), ...this.settings.body() };
    } catch (error) {
      this.unanswered(error.message);
      return;
    }
    const system = this.settings.field("system").value.trim();
    if (system) body.messages.unshift({ role: "system", content: system });
    for (;;) {
      const answer = begin();
      const failure = await this.stream(body, answer, signal, epoch);
      if (this.epoch !== epoch) return; // another conversation is shown by now
      if (failure?.status === 401 && await this.host.needsKey()) continue;
      this.finish(answer, failure);
      this.host.changed(true);
      return;
    }
  }

  /** What is said in the last message's sound, in the place of an answer. */
  async transcribe(signal, epoch) {
    const { media = [], content } = this.messages.at(-1) ?? {};
    const sounds = media.filter((one) => one.kind === "audio");
    if (!sounds.length) { this.unanswered(`${this.model.value} turns speech into text: attach or record some.`); return; }
    const answer = begin();
    let failure = null;
    try {
      const texts = [];
      for (const one of sounds) texts.push(await transcribe(this.model.value, blobOf(one.url), content, signal));
      answer.content = texts.map((text) => text.trim()).join("\n\n") || "(nothing is said)";
    } catch (error) { failure = error; }
    if (this.epoch !== epoch) return;
    if (failure?.status === 401 && await this.host.needsKey()) { await this.transcribe(signal, epoch); return; }
    this.finish(answer, failure);
    this.host.changed(true);
  }

  /** Streams into a new message. Returns what went wrong, or null. */
  async stream(body, answer, signal, epoch) {
    const view = new MessageView(answer, null);
    view.draw(true);
    this.log.append(view.root);
    this.log.scrollTop = this.log.scrollHeight;
    let waiting = 0, notBefore = 0;
    const draw = () => {
      waiting = 0;
      if (this.epoch !== epoch) return;
      const began = performance.now();
      if (began < notBefore) { waiting = requestAnimationFrame(draw); return; }
      const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
      view.draw(true);
      this.show(measure(answer));
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
      const now = performance.now();
      notBefore = now + SLOW_DRAW * (now - began);
    };
    try {
      await chat(body, signal, (chunk) => {
        take(answer, chunk);
        waiting ||= requestAnimationFrame(draw);
      });
      return null;
    } catch (error) {
      return error;
    } finally {
      cancelAnimationFrame(waiting);
      view.root.remove();
    }
  }

  /** Keeps an answer that is over, whole or not. */
  finish(answer, failure) {
    const stopped = failure?.name === "AbortError";
    this.show(measure(answer));
    if (isEmpty(answer) && failure) {
      this.unanswered(stopped ? "" : failure.message + (failure.retryAfter ? ` It asks to wait ${failure.retryAfter} s.` : ""));
      return;
    }
    const message = kept(answer);
    if (stopped) message.stopped = true;
    else if (failure) message.error = failure.message;
    this.add(message);
    say(stopped ? "Stopped." : failure ? failure.message : "The answer is complete.");
  }

  /** The last question got no answer: it stays to be seen, is not sent again by itself, and can be asked again. */
  unanswered(why) {
    const message = this.messages.at(-1);
    if (message?.role !== "user") {
      this.add({ role: "assistant", content: "", error: why || "Stopped before anything came.", reasoning: "", calls: [] });
      return;
    }
    message.unanswered = true;
    message.error = why || "Stopped before an answer came.";
    this.views.at(-1).draw();
    say(message.error);
  }

  show(stats) {
    if (!stats) return;
    const parts = [[`${stats.ttft} ms`, "TTFT"], [stats.rate ? stats.rate.toFixed(1) : "–", "tokens/s"], [stats.tokens, "tokens"]];
    if (stats.drafts) parts.push([stats.drafts.join(" of "), "drafts right"]);
    this.stats.replaceChildren(...parts.flatMap(([value, name], i) => [i ? " · " : "", el("b", { text: value }), ` ${name}`]));
  }
}
