// Files as data URLs: so they are kept in conversations, exported and sent.

/** A blob as a data URL. */
export function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("it cannot be read."));
    reader.readAsDataURL(blob);
  });
}

/** A data URL's type ("image/png") and what is behind the comma. */
export function split(url) {
  const [, type, data] = url.match(/^data:([^;,]+)[^,]*,(.*)$/s);
  return { type, data };
}

/** A data URL as a blob. */
export function blobOf(url) {
  const { type, data } = split(url);
  return new Blob([Uint8Array.from(atob(data), (one) => one.charCodeAt(0))], { type });
}
