// The playground: one or two panes, each with settings and a conversation of its own, driven by one message box.
import { chat, models } from "/static/api.js";
import { render } from "/static/render.js";

const $ = (selector, root = document) => root.querySelector(selector);
const panes = [];
let running = null; // the AbortController of the answers that are being written

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens"];
const EXAMPLES = {
  json_schema: '{\n  "type": "object",\n  "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},\n  "required": ["name", "age"],\n  "additionalProperties": false\n}',
  regex: "[0-9]{4}-[0-9]{2}-[0-9]{2}",
  choice: "yes\nno\nmaybe",
  grammar: 'start: "The answer is " NUMBER "."\nNUMBER: /[0-9]+/',
};

class Pane {
  constructor(names) {
    this.root = $("#pane").content.firstElementChild.cloneNode(true);
    this.log = $(".log", this.root);
    this.stats = $(".stats", this.root);
    this.settings = $(".settings", this.root);
    this.model = $(".model", this.root);
    for (const name of names) this.model.add(new Option(name));
    this.model.closest("label").hidden = names.length < 2;
    this.messages = [];
    const toggle = $(".toggle", this.root);
    toggle.addEventListener("click", () => {
      this.settings.hidden = !this.settings.hidden;
      toggle.setAttribute("aria-expanded", String(!this.settings.hidden));
    });
    const format = this.field("format");
    format.addEventListener("change", () => {
      const example = EXAMPLES[format.value];
      $(".structured", this.settings).hidden = !example;
      this.field("constraint").value = example || "";
      this.note("");
    });
    this.clear();
  }

  field(name) { return $(`[name="${name}"]`, this.settings); }

  note(text) { $(".note", this.settings).textContent = text; }

  clear() {
    this.messages = [];
    this.stats.textContent = "";
    const hint = document.createElement("p");
    hint.className = "empty";
    hint.textContent = "Ask something. Settings are per pane; Compare sends one message to two of them.";
    this.log.replaceChildren(hint);
  }

  /** The request's fields from the settings. Throws an Error for what cannot be read. */
  body() {
    const body = { model: this.model.value, messages: [...this.messages] };
    for (const name of NUMBERS) {
      const text = this.field(name).value.trim();
      if (text !== "") body[name] = Number(text);
    }
    const system = this.field("system").value.trim();
    if (system) body.messages.unshift({ role: "system", content: system });
    const stop = this.field("stop").value;
    if (stop) body.stop = [stop];
    const format = this.field("format").value;
    const constraint = this.field("constraint").value;
    if (format === "json_object") body.response_format = { type: "json_object" };
    else if (format === "json_schema") {
      let schema;
      try { schema = JSON.parse(constraint); } catch (error) { throw new Error(`The schema is not valid JSON: ${error.message}`); }
      body.response_format = { type: "json_schema", json_schema: { name: "reply", schema, strict: true } };
    } else if (format === "choice") body.structured_outputs = { choice: constraint.split("\n").map((line) => line.trim()).filter(Boolean) };
    else if (format) body.structured_outputs = { [format]: constraint };
    return body;
  }

  add(role, text) {
    $(".empty", this.log)?.remove();
    const bubble = document.createElement("div");
    bubble.className = `message ${role}`;
    bubble.append(render(text));
    this.log.append(bubble);
    this.log.scrollTop = this.log.scrollHeight;
    return bubble;
  }

  /** Sends what was said so far and writes the answer as it comes. Never rejects. */
  async answer(text, signal) {
    this.add("user", text);
    this.messages.push({ role: "user", content: text });
    let body;
    try { body = this.body(); } catch (error) {
      this.note(error.message);
      this.add("failed", error.message);
      this.messages.pop();
      return;
    }
    this.note("");
    const bubble = this.add("assistant busy", "");
    const state = { content: "", reasoning: "", calls: [], start: performance.now(), first: 0, last: 0, tokens: 0, usage: null, finish: null };
    let drawing = 0;
    const draw = () => {
      drawing = 0;
      const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 40;
      bubble.replaceChildren(render(state.content, state.reasoning, state.calls));
      this.show(state);
      if (atEnd) this.log.scrollTop = this.log.scrollHeight;
    };
    let failure = null;
    try {
      await chat(body, signal, (chunk) => {
        take(state, chunk);
        drawing ||= requestAnimationFrame(draw); // at most one drawing a frame, however fast tokens come
      });
    } catch (error) { failure = error; }
    cancelAnimationFrame(drawing);
    draw();
    bubble.classList.remove("busy");
    const stopped = failure?.name === "AbortError";
    if (state.content || state.calls.length) this.messages.push({ role: "assistant", content: state.content || "(tool call)" });
    else if (!stopped) this.messages.pop();
    if (failure && !stopped) {
      if (!state.content) bubble.remove();
      this.add("failed", failure.message);
    } else {
      const why = document.createElement("small");
      why.textContent = stopped ? "stopped" : { length: "cut at the token limit", tool_calls: "calls a tool" }[state.finish] || "";
      if (why.textContent) bubble.append(why);
    }
    this.log.scrollTop = this.log.scrollHeight;
  }

  show(state) {
    if (!state.first) return;
    const tokens = state.usage?.completion_tokens ?? state.tokens;
    const seconds = (state.last - state.first) / 1000;
    const rate = tokens > 1 && seconds > 0 ? ((tokens - 1) / seconds).toFixed(1) : "–";
    const parts = [["TTFT", `${Math.round(state.first - state.start)} ms`], ["tokens/s", rate], ["tokens", tokens]];
    this.stats.replaceChildren(...parts.flatMap(([name, value], i) => {
      const bold = document.createElement("b");
      bold.textContent = value;
      return [i ? " · " : "", bold, ` ${name}`];
    }));
  }
}

/** Adds one chunk to what is known of an answer. */
function take(state, chunk) {
  if (chunk.usage) state.usage = chunk.usage;
  for (const choice of chunk.choices) {
    const delta = choice.delta;
    if (delta.content || delta.reasoning || delta.tool_calls) {
      state.last = performance.now();
      state.first ||= state.last;
      state.tokens += 1; // about one a chunk; the exact count comes with the usage
    }
    state.content += delta.content || "";
    state.reasoning += delta.reasoning || "";
    for (const call of delta.tool_calls || []) {
      const known = (state.calls[call.index] ||= { name: "", arguments: "" });
      known.name += call.function?.name || "";
      known.arguments += call.function?.arguments || "";
    }
    state.finish = choice.finish_reason || state.finish;
  }
}

function setRunning(controller) {
  running = controller;
  $("#send").hidden = Boolean(controller);
  $("#stop").hidden = !controller;
}

async function send() {
  const box = $("#prompt");
  const text = box.value.trim();
  if (!text || running || !panes.length) return;
  box.value = "";
  grow();
  setRunning(new AbortController());
  await Promise.all(panes.map((pane) => pane.answer(text, running.signal)));
  setRunning(null);
  box.focus();
}

function grow() {
  const box = $("#prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function compare() {
  if (running || !panes.length) return;
  const two = panes.length === 1;
  if (two) {
    const pane = new Pane([...panes[0].model.options].map((option) => option.value));
    pane.model.selectedIndex = Math.min(1, pane.model.options.length - 1);
    panes.push(pane);
    $("#panes").append(pane.root);
  } else panes.pop().root.remove();
  $("#panes").classList.toggle("two", two);
  $("#compare").setAttribute("aria-pressed", String(two));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  try { localStorage.setItem("jaxserve-theme", theme); } catch { /* private windows */ }
}

function firstTheme() {
  let kept = null;
  try { kept = localStorage.getItem("jaxserve-theme"); } catch { /* private windows */ }
  return kept || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
}

async function begin() {
  setTheme(firstTheme());
  $("#theme").addEventListener("click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  $("#compare").addEventListener("click", compare);
  $("#clear").addEventListener("click", () => { running?.abort(); panes.forEach((pane) => pane.clear()); });
  $("#stop").addEventListener("click", () => running?.abort());
  $("#composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("#prompt").addEventListener("input", grow);
  $("#prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    else if (event.key === "." && (event.ctrlKey || event.metaKey)) { event.preventDefault(); compare(); }
  });
  try {
    const list = await models();
    // Aliases of one model have one root; "default" and the like would only be clutter here.
    const names = [...new Map(list.map((model) => [model.root ?? model.id, model.id]).reverse()).values()].reverse();
    panes.push(new Pane(names));
    $("#panes").append(panes[0].root);
    $("#status").textContent = `${names[0]} · context ${list[0].max_model_len} tokens`;
    $("#prompt").focus();
  } catch (error) {
    $("#status").textContent = `Not connected: ${error.message}`;
  }
}

begin();
