// Conversations, kept in this browser (IndexedDB). Where there is none (private windows), they last as long as the page.

const memory = new Map();
let opened;

function database() {
  opened ||= new Promise((resolve) => {
    let request;
    try { request = indexedDB.open("jaxserve", 1); } catch { resolve(null); return; }
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
  return opened;
}

async function act(mode, work, without) {
  const db = await database();
  if (!db) return without();
  return new Promise((resolve, reject) => {
    const transaction = db.transaction("conversations", mode);
    const request = work(transaction.objectStore("conversations"));
    if (mode === "readwrite") transaction.commit(); // else it is undone where the page goes before it heard of the end
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All of them, the latest first. */
export async function all() {
  const found = await act("readonly", (store) => store.getAll(), () => [...memory.values()]);
  return found.sort((a, b) => b.updated - a.updated);
}

/** One by its id, or undefined. */
export const get = (id) => act("readonly", (store) => store.get(id), () => memory.get(id));

/** Keeps one, in place of what had its id. */
export function save(conversation) {
  const plain = structuredClone(conversation);
  return act("readwrite", (store) => store.put(plain), () => memory.set(plain.id, plain));
}

/** Forgets one. */
export const remove = (id) => act("readwrite", (store) => store.delete(id), () => memory.delete(id));
