// Images that are sent: those that the server reads as they are, others and large ones drawn anew.
import { dataUrl } from "/static/attachments/urls.js";

const TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/gif"]); // what the server reads
const LARGEST = 2 * 2 ** 20; // bytes that are sent as they are
const LONGEST = 2048; // pixels of a side of what is drawn anew: more than the models look at

export const isImage = (file) => file.type.startsWith("image/");

/** An image file as a data URL. Throws an Error for what the browser cannot read. */
export async function image(file) {
  let picture;
  try { picture = await createImageBitmap(file); } catch { throw new Error("it cannot be read as an image."); }
  try {
    return await dataUrl(TYPES.has(file.type) && file.size <= LARGEST ? file : await redrawn(picture));
  } finally {
    picture.close();
  }
}

async function redrawn(picture) {
  const scale = Math.min(1, LONGEST / Math.max(picture.width, picture.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(scale * picture.width)), Math.max(1, Math.round(scale * picture.height)));
  const paper = canvas.getContext("2d");
  paper.fillStyle = "#fff"; // JPEG has no transparency
  paper.fillRect(0, 0, canvas.width, canvas.height);
  paper.drawImage(picture, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 });
}
