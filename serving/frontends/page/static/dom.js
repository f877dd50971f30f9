// Making nodes. Text is only ever set as text, so nothing that a model says becomes markup.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element with properties (`class`, `text`, `on` for listeners, others as attributes) and children. */
export function el(name, props = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (value === undefined || value === null || value === false) continue;
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else if (key === "on") for (const [event, listener] of Object.entries(value)) node.addEventListener(event, listener);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

/** A button that says what it does, also to those who do not see its sign. */
export function button(sign, label, onClick, props = {}) {
  return el("button", { type: "button", title: label, "aria-label": label, ...props, on: { click: onClick } }, sign);
}

/** Copies text; the button says so for a moment. */
export async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without https: the old way
    const box = el("textarea", { class: "hidden", "aria-hidden": "true" });
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  say("Copied.");
  const before = from.textContent;
  from.textContent = "Copied";
  setTimeout(() => { from.textContent = before; }, 1200);
}

/** Has a file saved. */
export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Tells screen readers what happened; nothing is seen. */
export function say(text) {
  const place = $("#said");
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}
