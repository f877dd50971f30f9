// Images and sound of a message, as they are seen.
import { el } from "/static/dom.js";

const IMAGES = /^data:image\/(png|jpeg|webp|gif);base64,/;
const SOUND = /^data:audio\/(wav|mpeg);base64,/;

/** Whether something is {kind, name, url} as the page keeps it: of a type that it shows, and nothing that leads elsewhere. */
export function isMedium(one) {
  if (typeof one?.name !== "string" || typeof one.url !== "string") return false;
  return one.kind === "image" ? IMAGES.test(one.url) : one.kind === "audio" && SOUND.test(one.url);
}

/** An image, small until it is pressed; or sound with what plays it. */
export function shown({ kind, name, url }) {
  if (kind === "audio") return el("audio", { src: url, controls: true, preload: "metadata", "aria-label": name });
  const picture = el("img", { src: url, alt: name });
  const press = () => {
    const large = box.classList.toggle("large");
    box.setAttribute("aria-pressed", String(large));
  };
  const box = el("button", { type: "button", class: "picture", title: name, "aria-label": `${name}: larger or smaller`, "aria-pressed": "false", on: { click: press } }, picture);
  return box;
}

/** All of a message's, or nothing. */
export const gallery = (media) => (media?.length ? el("div", { class: "media" }, ...media.map(shown)) : null);
