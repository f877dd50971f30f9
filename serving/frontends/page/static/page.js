// The playground: one or two panes driven by one message box, the conversations beside them, the key, the theme.
import { $, say } from "/static/dom.js";
import { hasKey, models, reads, setKey, transcribes } from "/static/api.js";
import { Attachments } from "/static/attachments/attachments.js";
import { Microphone } from "/static/attachments/microphone.js";
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
let latest = 0; // when a conversation was last kept
let sidebar;
let attachments;
let microphone;

const host = {
  busy: () => running !== null,
  async run(work) {
    if (running) return;
    const mine = new AbortController();
    setRunning(mine);
    try { await work(mine.signal); } finally { if (running === mine) setRunning(null); }
  },
  /** What was said is kept at once: a page that goes may keep nothing any more. What is typed into settings, when that pauses. */
  changed(said = false) {
    clearTimeout(saving);
    if (said) keep(); else saving = setTimeout(keep, SAVE_AFTER_MS);
    showDiff(false);
  },
  branch(pane, messages) {
    if (running) return;
    open({ ...blank(), panes: [{ settings: pane.state.settings, messages }] });
    keep();
  },
  chosen: () => microphone.show(),
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
  latest = Math.max(Date.now(), latest + 1); // two in one millisecond have an order, too
  Object.assign(current, { panes: states, updated: latest });
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
  microphone.show();
  panes.forEach((pane, i) => pane.root.setAttribute("aria-label", count === 1 ? "Pane" : ["Left pane", "Right pane"][i]));
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
  const ready = () => !running && panes.length && panes.every((pane) => pane.settings.check());
  if (!ready()) return;
  if (attachments.reading) {
    const read = await attachments.reading;
    if (!read.every(Boolean) || !ready()) return; // something would be missing, or it was sent meanwhile
  }
  const message = attachments.take(box.value.trim());
  if (!message.content && !message.media.length) return;
  box.value = "";
  grow();
  await host.run((signal) => Promise.all(panes.map((pane) => pane.ask(message, signal))));
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
    const talking = cards.filter((card) => !card.tasks || card.tasks.includes("generate") || transcribes(card));
    cards = talking.length ? talking : cards; // embedding models answer no messages
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
  document.addEventListener("visibilitychange", () => { if (document.hidden) flush(); }); // phones end pages without a word
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
    await attach(event.target.files);
    event.target.value = "";
  });
  on("#prompt", "paste", (event) => {
    if (!event.clipboardData.files.length) return;
    event.preventDefault();
    attach([...event.clipboardData.files]);
  });
  on("#chat", "dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    $("#chat").classList.add("dropping");
  });
  on("#chat", "dragleave", (event) => { if (!$("#chat").contains(event.relatedTarget)) $("#chat").classList.remove("dropping"); });
  on("#chat", "drop", (event) => {
    $("#chat").classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    attach([...event.dataTransfer.files]);
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

async function attach(files) {
  fail("");
  await Promise.all([...files].map((file) => attachments.add(file)));
  $("#prompt").focus();
}

/** Why none of the chosen models is sent an "image" or "audio"; "" where one is. */
function refuses(kind) {
  const chosen = panes.map((pane) => pane.card);
  if (!chosen.length || chosen.some((card) => reads(card, kind))) return "";
  const what = { image: "images", audio: "sound" }[kind];
  const others = cards.filter((card) => reads(card, kind)).map((card) => card.id);
  const way = others.length ? `${others.slice(0, 3).join(", ")} can.` : "this server has no model that can.";
  return `${[...new Set(chosen.map((card) => card.id))].join(" and ")} cannot read ${what}; ${way}`;
}

/** Puts words at the end of what is being written. */
function dictate(words) {
  const box = $("#prompt");
  box.value = [box.value.trimEnd(), words].filter(Boolean).join(" ");
  grow();
  box.focus();
}

function editLast() {
  const view = panes[0]?.views.findLast((one) => one.message.role === "user");
  view?.edit();
}

setTheme(firstTheme());
attachments = new Attachments(() => panes[0]?.model.value, refuses, fail);
microphone = new Microphone({
  hears: () => panes.some((pane) => reads(pane.card, "audio")),
  writer: () => cards.find(transcribes)?.id,
  attach: (file) => attach([file]),
  dictate,
  fail,
});
sidebar = new Sidebar({ get current() { return current; }, open, fresh, fail });
listen();
connect();
