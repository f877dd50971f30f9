// A conversation as a Markdown file: for people to read, and read back by the page. Images and sound are named, not kept.
import { blank, titleOf } from "/static/conversation/conversation.js";

const HEADS = { user: "You", assistant: "Assistant", tool: "Tool" };
const ROLES = Object.fromEntries(Object.entries(HEADS).map(([role, head]) => [head, role]));
const HEAD = /^(\\*)\*\*(You|Assistant|Tool|System)\*\*$/;
const SIDE = /^(\\*)## (Left|Right):/;
const CALL = /\n*```json\n([\w.-]+)\(((?:(?!\n```)[\s\S])*)\)\n```$/;

/** The file. */
export function toMarkdown(conversation) {
  const out = [`# ${conversation.title || titleOf(conversation)}`, ""];
  conversation.panes.forEach((pane, i) => {
    if (conversation.panes.length > 1) out.push(`## ${i ? "Right" : "Left"}: ${pane.settings.model ?? ""}`, "");
    if (pane.settings.system) out.push("**System**", "", escaped(pane.settings.system), "");
    for (const message of pane.messages) {
      out.push(`**${HEADS[message.role]}**`, "");
      for (const { name } of message.media ?? []) out.push(`*attached: ${name}*`, "");
      if (message.content) out.push(escaped(message.content), "");
      for (const call of message.calls ?? []) out.push("```json", `${call.name}(${call.arguments})`, "```", "");
    }
  });
  return out.join("\n");
}

/** The conversation of such a file. Throws an Error where it is none. */
export function fromMarkdown(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const title = lines[0]?.match(/^# (.*)$/)?.[1] ?? "";
  const panes = [];
  let into = null; // the lines of what is being read
  const pane = () => { if (!panes.length) panes.push({ settings: {}, said: [] }); return panes.at(-1); };
  for (const line of lines.slice(title ? 1 : 0)) {
    const head = line.match(HEAD), side = line.match(SIDE);
    if (side && !side[1]) { panes.push({ settings: { model: line.slice(line.indexOf(":") + 1).trim() }, said: [] }); into = null; }
    else if (head && !head[1]) { into = []; pane().said.push([head[2], into]); }
    else into?.push(head || side ? line.slice(1) : line);
  }
  const read = panes.slice(0, 2).map(({ settings, said }) => {
    const system = said.filter(([head]) => head === "System").map(([, body]) => trimmed(body)).join("\n");
    const messages = said.filter(([head]) => head in ROLES).map(([head, body]) => messageOf(ROLES[head], trimmed(body)));
    return { settings: { ...settings, ...(system ? { system } : {}) }, messages: withIds(messages) };
  });
  if (!read.some((one) => one.messages.length)) throw new Error("The file holds no conversation: it has no line **You**.");
  return { ...blank(), title, panes: read };
}

/** A line that would be taken for a head gets a backslash in front, which reading takes away again. */
const escaped = (text) => text.split("\n").map((line) => (HEAD.test(line) || SIDE.test(line) ? `\\${line}` : line)).join("\n");

const trimmed = (lines) => lines.join("\n").replace(/^\n+|\n+$/g, "");

function messageOf(role, text) {
  const calls = [];
  for (let found; role === "assistant" && (found = text.match(CALL)); text = text.slice(0, found.index)) {
    calls.unshift({ id: "", name: found[1], arguments: found[2] });
  }
  return { role, content: text, ...(calls.length ? { calls } : {}) };
}

/** Calls and the tools' results behind them share an id each, in their order. */
function withIds(messages) {
  const waiting = [];
  let count = 0;
  for (const message of messages) {
    for (const call of message.calls ?? []) { call.id = `call_${count += 1}`; waiting.push(call); }
    if (message.role !== "tool") continue;
    const call = waiting.shift();
    message.id = call?.id ?? `call_${count += 1}`;
    if (call) call.answered = true;
  }
  return messages;
}
