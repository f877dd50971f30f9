// Talking to the server: the model list, and a chat as a stream of chunks.

/** Names of the served models, the server's own first. */
export async function models() {
  const reply = await fetch("/v1/models");
  if (!reply.ok) throw new Error(`The server answers ${reply.status}.`);
  return (await reply.json()).data;
}

/** The sentence in an error reply, whatever its form. */
async function why(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `The server answers ${reply.status}.`;
  }
}

/**
 * Streams a chat. Calls onChunk with each decoded chunk; resolves when the stream is over.
 * Rejects with an Error whose message is for the reader, or with AbortError when the signal fires.
 */
export async function chat(body, signal, onChunk) {
  const reply = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!reply.ok) throw new Error(await why(reply));
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (!data) continue; // a comment that keeps the connection alive
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      onChunk(chunk);
    }
  }
}
