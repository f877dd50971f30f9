// How the server is doing, at a glance: asked every few seconds while the page is seen.
import { health } from "/static/api.js";
import { $ } from "/static/dom.js";

const EVERY_MS = 3000;

/** Begins to show it. */
export function watch() {
  const place = $("#health");
  let timer = 0;
  const look = async () => {
    clearTimeout(timer);
    if (document.hidden) return;
    try {
      const found = await health();
      place.hidden = !found;
      place.className = "up";
      if (found) place.textContent = `${found.running} running · ${found.waiting} waiting · KV ${Math.round(100 * found.kv)} %`;
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
