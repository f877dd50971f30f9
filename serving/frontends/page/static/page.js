// The playground: one or two panes driven by one message box, the conversations beside them, the key, the theme.
import { $, say } from "/static/dom.js";
import { hasKey, models, setKey } from "/static/api.js";
import { Attachments } from "/static/attachments.js";
import { blank, titleOf } from "/static/conversation/conversation.js";
import { diff } from "/static/diff.js";
import { watch } from "/static/health.js";
import { Pane } from "/static/pane.js";
import { Sidebar } from "/static/sidebar.js";
import { showTemplate } from "/static/template.js";
import * as store from "/static/conversation/store.js";

const SAVE_AFTER_MS = 300;
const panes = [];
let cards = [];
let running = null; // the AbortController of the answers that are being written
let current = blank();
let saving = 0;
let sidebar;
let attachments;

const host = {
  busy: () => running !== null,
  async run(work) {
    if (running) return;
    const mine = new AbortController();
    setRunning(mine);
    try { await work(mine.signal); } finally { if (running === mine) setRunning(null); }
  },
  changed() {
    clearTimeout(saving);
    saving = setTimeout(keep, SAVE_AFTER_MS);
    showDiff(false);
  },
  branch(pane, messages) {
    if (running) return;
    open({ ...blank(), panes: [{ settings: pane.state.settings, messages }] });
    keep();
  },
  template: (model) => showTemplate(model, fail),
  needsKey: () => askKey("The server asks for an API key."),
};

/** Keeps what is waiting to be kept, before another conversation is shown or the page goes. */
function flush() { if (saving) keep(); }

async function keep() {
  clearTimeout(saving);
  saving = 0;
  const states = panes.map((pane) => pane.state);
  if (!states.some((state) => state.messages.length)) return;
  Object.assign(current, { panes: states, updated: Date.now() });
  current.title = titleOf(current);
  await store.save(current); // a copy of it as it is now
  await sidebar.draw();
}

function setRunning(controller) {
  running = controller;
  document.body.classList.toggle("running", Boolean(controller));
  $("#send").hidden = Boolean(controller);
  $("#stop").hidden = !controller;
}

/** Ends what is being written, and whatever would still be kept of it. */
function interrupt() {
  running?.abort();
  setRunning(null);
}

function open(conversation) {
  flush();
  interrupt();
  current = structuredClone(conversation);
  resize(Math.max(1, Math.min(2, current.panes.length)));
  panes.forEach((pane, i) => pane.load(current.panes[i] ?? { settings: {}, messages: [] }));
  sidebar.draw();
}

function fresh() {
  const kept = panes.map((pane) => ({ settings: pane.state.settings, messages: [] }));
  open({ ...blank(), panes: kept });
  $("#prompt").focus();
}

function resize(count) {
  while (panes.length > count) panes.pop().root.remove();
  while (panes.length < count) {
    const pane = new Pane(cards, host);
    panes.push(pane);
    $("#panes").append(pane.root);
  }
  $("#panes").classList.toggle("two", count === 2);
  $("#compare").setAttribute("aria-pressed", String(count === 2));
  $("#diff").hidden = count !== 2;
  showDiff(false);
}

/** A second pane with the first one's settings and conversation, and the next model where there is one; or none. */
function compare() {
  if (running || !panes.length) return;
  if (panes.length === 2) { resize(1); host.changed(); return; }
  const first = panes[0].state;
  resize(2);
  panes[1].load(first);
  const at = cards.findIndex((card) => card.id === first.settings.model);
  panes[1].model.selectedIndex = Math.min(at + 1, cards.length - 1);
  panes[1].suggest();
  host.changed();
}

function showDiff(on) {
  const toggle = $("#diff");
  if ((toggle.getAttribute("aria-pressed") === "true") === on) return;
  toggle.setAttribute("aria-pressed", String(on));
  const last = panes.map((pane) => pane.views.at(-1)).filter((view) => view?.message.role === "assistant");
  if (!on) last.forEach((view) => view.draw());
  else if (last.length === 2) diff(...last.map((view) => view.message.content)).forEach((pieces, i) => last[i].drawDiff(pieces));
}

async function send() {
  const box = $("#prompt");
  if (running || !panes.length || !panes.every((pane) => pane.settings.check())) return;
  const text = attachments.take(box.value.trim());
  if (!text) return;
  box.value = "";
  grow();
  await host.run((signal) => Promise.all(panes.map((pane) => pane.ask(text, signal))));
  box.focus();
}

function grow() {
  const box = $("#prompt");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

function fail(text) {
  const place = $("#notice");
  place.textContent = text;
  place.hidden = !text;
  say(text);
}

/** Asks for a key until there is one or the reader gives up. Resolves to whether one was given. */
function askKey(why) {
  const dialog = $("#key-dialog");
  const box = $("#key-box");
  $("#key-why").textContent = why;
  box.value = "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", () => {
    const given = dialog.returnValue === "use";
    dialog.returnValue = "";
    if (given) setKey(box.value);
    box.value = ""; // the page keeps it in one place
    $("#key").setAttribute("aria-pressed", String(hasKey()));
    resolve(given);
  }, { once: true }));
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

/** Learns what is served; asks for a key where that needs one. */
async function connect() {
  $("#again").hidden = true;
  $("#status").textContent = "connecting…";
  try {
    const list = await models();
    // Aliases of one model have one root; "default" and the like would only be clutter here. Adapters have a base as their parent.
    cards = [...new Map(list.map((card) => [card.parent ? card.id : card.root ?? card.id, card]).reverse()).values()].reverse();
    $("#status").textContent = `${cards[0].id} · context ${cards[0].max_model_len} tokens`;
    fail("");
    if (!panes.length) resize(1);
    await sidebar.draw();
    watch();
    $("#prompt").focus();
  } catch (error) {
    if (error.status === 401 && await askKey(hasKey() ? "The server does not know this key." : "The server asks for an API key.")) {
      await connect();
      return;
    }
    $("#status").textContent = "not connected";
    fail(error.message);
    $("#again").hidden = false;
  }
}

function listen() {
  addEventListener("pagehide", flush);
  const on = (id, event, listener) => $(id).addEventListener(event, listener);
  on("#theme", "click", () => setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
  on("#compare", "click", compare);
  on("#diff", "click", () => showDiff($("#diff").getAttribute("aria-pressed") !== "true"));
  on("#clear", "click", fresh);
  on("#again", "click", connect);
  on("#stop", "click", () => running?.abort());
  on("#key", "click", async () => { if (await askKey("A key for this server. It is kept in this page's memory alone.") && !cards.length) await connect(); });
  on("#key-form", "submit", (event) => { event.preventDefault(); $("#key-dialog").close("use"); });
  on("#template-close", "click", () => $("#template-dialog").close());
  on("#key-cancel", "click", () => $("#key-dialog").close(""));
  on("#attach", "click", () => $("#attach-file").click());
  on("#attach-file", "change", async (event) => {
    fail("");
    for (const file of event.target.files) await attachments.add(file);
    event.target.value = "";
    $("#prompt").focus();
  });
  on("#composer", "submit", (event) => { event.preventDefault(); send(); });
  on("#prompt", "input", grow);
  on("#prompt", "keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    else if (event.key === "ArrowUp" && !event.target.value && !running) { event.preventDefault(); editLast(); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
    else if (event.key === "." && (event.ctrlKey || event.metaKey)) { event.preventDefault(); compare(); }
  });
}

function editLast() {
  const view = panes[0]?.views.findLast((one) => one.message.role === "user");
  view?.edit();
}

setTheme(firstTheme());
attachments = new Attachments(() => panes[0]?.model.value, fail);
sidebar = new Sidebar({ get current() { return current; }, open, fresh, fail });
listen();
connect();
