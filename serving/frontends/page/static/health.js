// How the server is doing, at a glance: asked every few seconds while the page is seen.
import { health, models } from "/static/api.js";
import { $, $$ } from "/static/dom.js";

const EVERY_MS = 3000;

/** Begins to show it. */
export function watch() {
  const place = $("#health");
  let timer = 0;
  let several = true; // until the server's list says that no model ever goes
  const look = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const found = await health();
      const loaded = several ? await states() : "";
      several &&= loaded !== "";
      const parts = [found && `${found.running} running · ${found.waiting} waiting · KV ${Math.round(100 * found.kv)} %`, loaded];
      place.textContent = parts.filter(Boolean).join(" · ");
      place.hidden = !place.textContent;
      place.className = "up";
    } catch {
      place.hidden = false;
      place.className = "down";
      place.textContent = "not reachable";
    }
    timer = setTimeout(look, EVERY_MS);
  };
  document.addEventListener("visibilitychange", look);
  look();
}

/** Where several models share the server, says behind each name which of them are not loaded; how many are, in words, or "". */
async function states() {
  const cards = new Map((await models()).filter((card) => card.status).map((card) => [card.id, card.status.value]));
  for (const option of $$(".model option")) {
    const state = cards.get(option.value);
    option.label = state && state !== "loaded" ? `${option.value} (${state})` : option.value;
  }
  const loaded = [...cards.values()].filter((state) => state === "loaded").length;
  return cards.size ? `${loaded} of ${cards.size} models loaded` : "";
}
