// What a conversation is, and its forms outside of the page.
//
// {id, title, created, updated, panes: [{settings: {name: text}, messages: [message]}]}
// message: {role: "user" | "assistant" | "tool", content, of a user's also media [{kind: "image" | "audio", name, url: "data:..."}],
// and of an answer: reasoning, calls [{id, name, arguments}], finish, stats
// {ttft, rate, tokens}, tokens [{text, p, top: [[text, p]]}], error}; a user's message that nobody answered has `unanswered`, and
// is not sent again.

import { split } from "/static/attachments/urls.js";
import { isMedium } from "/static/messages/media.js";

const FORMAT = "jaxserve-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);
const TITLE = 60; // characters

export function blank() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now, panes: [] };
}

/** The beginning of the first question. */
export function titleOf(conversation) {
  const first = conversation.panes[0]?.messages.find((message) => message.role === "user");
  const line = (first?.content || first?.media?.[0]?.name || "").trim().split("\n")[0];
  return line.length > TITLE ? `${line.slice(0, TITLE)}…` : line || "New conversation";
}

/** What the server is sent of messages. */
export function wire(messages) {
  const said = (message) => !message.unanswered && (message.role !== "assistant" || message.content || message.calls?.length);
  return messages.filter(said).map((message) => {
    if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
    if (message.media?.length) return { role: message.role, content: [...message.media.map(part), ...(message.content ? [{ type: "text", text: message.content }] : [])] };
    if (!message.calls?.length) return { role: message.role, content: message.content };
    const calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
    return { role: "assistant", content: message.content || null, tool_calls: calls };
  });
}

/** A part of a message's content, as OpenAI has it. */
function part({ kind, url }) {
  if (kind === "image") return { type: "image_url", image_url: { url } };
  const { type, data } = split(url);
  return { type: "input_audio", input_audio: { data, format: type === "audio/mpeg" ? "mp3" : "wav" } };
}

export function toJson(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Conversations of an exported file, under new ids. Throws an Error that says what is wrong with it. */
export function fromJson(text) {
  let found;
  try { found = JSON.parse(text); } catch (error) { throw new Error(`The file is not JSON: ${error.message}`); }
  if (found?.format !== FORMAT || !Array.isArray(found.conversations)) throw new Error("The file holds no exported conversations.");
  return found.conversations.map((one) => {
    const panes = Array.isArray(one?.panes) ? one.panes : [];
    const copies = panes.slice(0, 2).map((pane) => ({
      settings: Object.fromEntries(Object.entries(pane?.settings ?? {}).filter(([, value]) => typeof value === "string")),
      messages: (Array.isArray(pane?.messages) ? pane.messages : []).filter((m) => ROLES.has(m?.role) && typeof m.content === "string").map(sound),
    }));
    if (!copies.length) throw new Error("A conversation in the file has no messages.");
    return { ...blank(), title: String(one.title ?? ""), panes: copies };
  });
}

/** A message without media that the page cannot show. */
function sound(message) {
  const { media, ...rest } = message;
  const shown = (Array.isArray(media) ? media : []).filter(isMedium);
  return shown.length ? { ...rest, media: shown } : rest;
}
