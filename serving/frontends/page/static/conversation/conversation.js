// What a conversation is, and its forms outside of the page.
//
// {id, title, created, updated, panes: [{settings: {name: text}, messages: [message]}]}
// message: {role: "user" | "assistant" | "tool", content, and of an answer: reasoning, calls [{id, name, arguments}], finish, stats
// {ttft, rate, tokens}, tokens [{text, p, top: [[text, p]]}], error}; a user's message that nobody answered has `unanswered`, and
// is not sent again.

const FORMAT = "jaxserve-conversations";
const ROLES = new Set(["user", "assistant", "tool"]);
const TITLE = 60; // characters

export function blank() {
  const now = Date.now();
  return { id: crypto.randomUUID?.() ?? `${now}-${Math.random()}`, title: "", created: now, updated: now, panes: [] };
}

/** The beginning of the first question. */
export function titleOf(conversation) {
  const first = conversation.panes[0]?.messages.find((message) => message.role === "user")?.content ?? "";
  const line = first.trim().split("\n")[0];
  return line.length > TITLE ? `${line.slice(0, TITLE)}…` : line || "New conversation";
}

/** What the server is sent of messages. */
export function wire(messages) {
  const said = (message) => !message.unanswered && (message.role !== "assistant" || message.content || message.calls?.length);
  return messages.filter(said).map((message) => {
    if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
    if (!message.calls?.length) return { role: message.role, content: message.content };
    const calls = message.calls.map(({ id, name, arguments: text }) => ({ id, type: "function", function: { name, arguments: text } }));
    return { role: "assistant", content: message.content || null, tool_calls: calls };
  });
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
      messages: (Array.isArray(pane?.messages) ? pane.messages : []).filter((m) => ROLES.has(m?.role) && typeof m.content === "string"),
    }));
    if (!copies.length) throw new Error("A conversation in the file has no messages.");
    return { ...blank(), title: String(one.title ?? ""), panes: copies };
  });
}

/** For people to read. */
export function toMarkdown(conversation) {
  const out = [`# ${conversation.title || titleOf(conversation)}`, ""];
  conversation.panes.forEach((pane, i) => {
    if (conversation.panes.length > 1) out.push(`## ${i ? "Right" : "Left"}: ${pane.settings.model ?? ""}`, "");
    if (pane.settings.system) out.push("**System**", "", pane.settings.system, "");
    for (const message of pane.messages) {
      out.push(`**${{ user: "You", assistant: "Assistant", tool: "Tool" }[message.role]}**`, "");
      if (message.content) out.push(message.content, "");
      for (const call of message.calls ?? []) out.push("```json", `${call.name}(${call.arguments})`, "```", "");
    }
  });
  return out.join("\n");
}
