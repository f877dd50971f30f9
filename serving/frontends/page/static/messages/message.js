// One message as it is seen: its text, its thinking folded away, its tool calls, the probabilities of its tokens, and what can be
// done with it.
import { button, copy, el } from "/static/dom.js";
import { gallery } from "/static/messages/media.js";
import { code, markdown } from "/static/messages/markdown.js";

const NAMES = { user: "You", assistant: "Assistant", tool: "Tool result" };
const WHY = { length: "cut at the token limit", tool_calls: "waits for a tool's result", abort: "the server ended this answer", content_filter: "filtered" };

/**
 * A message's node and what redraws it.
 * `does` has a function for each action: edit, resend, regenerate, branch, remove, result. None: nothing can be done (yet).
 */
export class MessageView {
  constructor(message, does) {
    this.message = message;
    this.does = does;
    this.body = el("div", { class: "body" });
    this.thinking = el("details", { class: "thinking", hidden: true }, el("summary", { text: "Thinking" }));
    this.thought = el("div", { class: "thought" });
    this.thinking.append(this.thought);
    this.foot = el("footer");
    this.root = el("article", { class: `message ${message.role}` }, el("h2", { class: "hidden", text: NAMES[message.role] }), this.thinking, this.body, this.foot);
    this.draw();
  }

  /** Shows the message as it is now. While it is being written only its text changes. */
  draw(busy = false) {
    const { message } = this;
    this.root.classList.toggle("busy", busy);
    this.root.classList.toggle("unanswered", Boolean(message.unanswered));
    this.root.setAttribute("aria-busy", String(busy));
    this.thinking.hidden = !message.reasoning;
    if (this.thought.textContent !== message.reasoning) this.thought.textContent = message.reasoning ?? "";
    const text = message.role === "assistant" ? markdown(message.content) : plain(message.content);
    this.body.replaceChildren(...[gallery(message.media), text].filter(Boolean), ...(message.calls ?? []).filter(Boolean).map((call) => this.call(call, busy)));
    if (!busy) this.foot.replaceChildren(...this.notes(), this.actions());
  }

  /** Words of this answer that another one has not are marked. Pieces are [words, isCommon]. */
  drawDiff(pieces) {
    this.body.replaceChildren(el("div", { class: "plain" }, ...pieces.map(([text, common]) => (common ? text : el("mark", { text })))));
  }

  notes() {
    const { message } = this;
    const out = [];
    if (message.error) {
      const again = this.does && button("Try again", "Try again", () => (message.role === "user" ? this.does.resend(message) : this.does.regenerate(message)), { class: "retry" });
      out.push(el("p", { class: "failed", role: "alert" }, message.error, again));
    }
    const { stats } = message;
    const parts = [message.stopped ? "stopped" : WHY[message.finish]];
    if (stats) parts.push(`${stats.ttft} ms`, stats.rate && `${stats.rate.toFixed(1)} tokens/s`, `${stats.tokens} tokens`, stats.drafts && `${stats.drafts.join(" of ")} drafts right`);
    const small = parts.filter(Boolean).join(" · ");
    if (small) out.push(el("small", { text: small, title: "Why it ended, time to the first token, tokens a second after it, tokens, drafts of the next tokens that were right" }));
    return out;
  }

  actions() {
    const { message, does } = this;
    const bar = el("span", { class: "actions" });
    if (!does) return bar;
    const add = (sign, label, action) => bar.append(button(sign, label, action));
    add("Copy", "Copy this message", (event) => copy(message.content, event.currentTarget));
    if (message.role === "user") add("Edit", "Edit and send again", () => this.edit());
    if (message.role === "assistant") add("Again", "Answer again", () => does.regenerate(message));
    if (message.tokens?.length) add("Tokens", "Tokens: how likely each was", (event) => this.toggleTokens(event.currentTarget));
    add("Branch", "Branch: a new conversation from here", () => does.branch(message));
    add("Delete", "Delete this message", () => does.remove(message));
    return bar;
  }

  /** A box in place of the text. */
  edit() {
    const box = el("textarea", { rows: Math.min(12, this.message.content.split("\n").length + 1), "aria-label": "Edit your message" });
    box.value = this.message.content;
    const done = () => { this.draw(); };
    const send = () => { if (box.value.trim() || this.message.media?.length) this.does.edit(this.message, box.value.trim()); };
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(); }
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    const keys = el("div", { class: "row" }, button("Send", "Send this instead", send, { class: "primary" }), button("Cancel", "Cancel: leave it as it was", done));
    this.body.replaceChildren(box, keys);
    this.foot.replaceChildren();
    box.focus();
  }

  /** A call as the model made it; where nobody has answered it yet, a box for what the tool gave. */
  call(call, busy) {
    const block = el("div", { class: "call" }, code(`${call.name}(${pretty(call.arguments)})`, "tool call"));
    if (busy || !this.does || call.answered) return block;
    const box = el("textarea", { rows: 2, "aria-label": `Result of ${call.name}`, placeholder: "What the tool gives back" });
    block.append(el("div", { class: "row" }, box, button("Send result", "Send result: go on with it", () => this.does.result(this.message, call, box.value))));
    return block;
  }

  toggleTokens(from) {
    const showing = from.getAttribute("aria-pressed") === "true";
    from.setAttribute("aria-pressed", String(!showing));
    if (showing) this.body.replaceChildren(markdown(this.message.content));
    else this.body.replaceChildren(tokens(this.message.tokens));
  }
}

function pretty(text) {
  try { return JSON.stringify(JSON.parse(text), null, 2); } catch { return text; }
}

function plain(text) {
  return el("div", { class: "plain", text });
}

const percent = (p) => `${(100 * p).toFixed(p > 0.0995 ? 0 : 1)} %`;
const shown = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

/** Tokens shaded by how likely they were; the one that is pointed at, or has the focus, shows what else could have stood there. */
function tokens(list) {
  const others = el("div", { class: "others", "aria-live": "polite" }, "Point at a token, or go through them with the arrow keys.");
  const row = el("div", { class: "tokens", role: "group", "aria-label": "Tokens" });
  const show = (token) => {
    others.replaceChildren(el("b", { text: shown(token.text) }), ` ${percent(token.p)}`, ...token.top.filter(([text]) => text !== token.text).map(([text, p]) => el("span", {}, el("code", { text: shown(text) }), ` ${percent(p)}`)));
  };
  list.forEach((token, i) => {
    const one = el("button", { type: "button", class: `token p${Math.min(9, Math.floor(token.p * 10))}`, tabindex: i ? -1 : 0, text: token.text.replaceAll("\n", "↵"), "aria-label": `${shown(token.text)}, ${percent(token.p)}` });
    one.addEventListener("pointerenter", () => show(token));
    one.addEventListener("focus", () => show(token));
    row.append(one, ...Array.from({ length: token.text.split("\n").length - 1 }, () => el("br")));
  });
  row.addEventListener("keydown", (event) => {
    const next = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
    let to = next && event.target[next];
    while (to?.tagName === "BR") to = to[next];
    if (!to) return;
    event.preventDefault();
    event.target.tabIndex = -1;
    to.tabIndex = 0;
    to.focus();
  });
  return el("div", {}, row, others);
}
