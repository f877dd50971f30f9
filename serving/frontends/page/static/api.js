// Talking to the server: the model list, a chat as a stream of chunks, how it is doing. The key stays in this module's memory.

let key = "";

/** The API key of what follows; "" for none. */
export function setKey(value) { key = value.trim(); }
export const hasKey = () => key !== "";

/** What went wrong, in a sentence for the reader. `status` is 0 where no reply came; `retryAfter` is in seconds. */
export class ApiError extends Error {
  constructor(message, status = 0, retryAfter = 0) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

async function send(path, init = {}) {
  const headers = { ...init.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let reply;
  try {
    reply = await fetch(path, { ...init, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running, and the network up?");
  }
  if (reply.ok) return reply;
  throw new ApiError(await words(reply), reply.status, Number(reply.headers.get("Retry-After")) || 0);
}

/** The sentence in an error reply, whatever its form. */
async function words(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answers ${reply.status}.`;
  }
}

/** The served models, the server's own first. */
export async function models() {
  return (await (await send("/v1/models")).json()).data;
}

/** How many tokens a text is. */
export async function countTokens(model, prompt) {
  const body = JSON.stringify({ model, prompt, add_special_tokens: false });
  return (await (await send("/tokenize", { method: "POST", headers: { "Content-Type": "application/json" }, body })).json()).count;
}

/** A model's special tokens and chat template. */
export async function tokenizerInfo(model) {
  return (await send(`/tokenizer_info?model=${encodeURIComponent(model)}`)).json();
}

/** The text of a PDF. */
export async function pdfText(file) {
  return (await send("/page/pdf", { method: "POST", headers: { "Content-Type": "application/pdf" }, body: file })).json();
}

/** What is said in a sound (a Blob), by a model that turns speech into text. */
export async function transcribe(model, sound, prompt, signal) {
  const body = new FormData();
  body.append("model", model);
  body.append("file", sound, sound.type === "audio/mpeg" ? "sound.mp3" : "sound.wav");
  if (prompt) body.append("prompt", prompt);
  return (await (await send("/v1/audio/transcriptions", { method: "POST", body, signal })).json()).text;
}

/** Whether a model of the server's list reads "image" or "audio". One that does not say is asked. */
export const reads = (card, kind) => !card?.input_modalities || card.input_modalities.includes(kind);

/** Whether a model turns speech into text, and does nothing else. */
export const transcribes = (card) => Boolean(card?.tasks?.includes("transcribe"));

/** Requests that run and wait, and the part of the KV cache in use; null where the server does not tell. */
export async function health() {
  try {
    const text = await (await send("/metrics")).text();
    const sum = (name) => [...text.matchAll(new RegExp(`^jaxserve:${name}\\{[^}]*\\} (\\S+)$`, "gm"))].map((found) => Number(found[1]));
    const [running, waiting, kv] = [sum("num_requests_running"), sum("num_requests_waiting"), sum("kv_cache_usage_perc")];
    if (!running.length) return null;
    const total = (values) => values.reduce((a, b) => a + b, 0);
    return { running: total(running), waiting: total(waiting), kv: Math.max(0, ...kv) };
  } catch (error) {
    if (error.status === 0) throw error;
    return null;
  }
}

/**
 * Streams a chat. Calls onChunk with each decoded chunk; resolves when the stream is over.
 * Rejects with an ApiError, or with AbortError when the signal fires.
 */
export async function chat(body, signal, onChunk) {
  const reply = await send("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let value, done;
    try {
      ({ value, done } = await reader.read());
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection broke before the answer was complete.");
    }
    if (done) throw new ApiError("The connection ended before the answer was complete.");
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue; // a comment that keeps the connection alive
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, 200);
      onChunk(chunk);
    }
  }
}
