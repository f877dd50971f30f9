// A pane's settings: the form, what it becomes in a request, and what is wrong with it.
import { $, $$ } from "/static/dom.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed", "max_tokens"];
const API_DEFAULTS = { temperature: 1, top_p: 1, top_k: 0, min_p: 0, repetition_penalty: 1, presence_penalty: 0, frequency_penalty: 0 };
const EXAMPLES = {
  json_schema: '{\n  "type": "object",\n  "properties": {\n    "name": {"type": "string"},\n    "age": {"type": "integer"}\n  },\n  "required": ["name", "age"],\n  "additionalProperties": false\n}',
  regex: "[0-9]{4}-[0-9]{2}-[0-9]{2}",
  choice: "yes\nno\nmaybe",
  grammar: 'start: "The answer is " NUMBER "."\nNUMBER: /[0-9]+/',
};
const TOOL_EXAMPLE = '[\n  {\n    "name": "get_weather",\n    "description": "The weather in a city",\n    "parameters": {\n      "type": "object",\n      "properties": {"city": {"type": "string"}},\n      "required": ["city"]\n    }\n  }\n]';
const TYPES = new Set(["object", "array", "string", "number", "integer", "boolean", "null"]);

export class Settings {
  /** `root` is the form; `changed` is called when a value changes. */
  constructor(root, changed) {
    this.root = root;
    root.addEventListener("input", () => { this.check(); changed(); });
    const format = this.field("format");
    format.addEventListener("change", () => {
      this.field("constraint").value = EXAMPLES[format.value] ?? "";
      this.show();
      changed();
    });
    $(".tidy", root).addEventListener("click", () => { this.tidy(); changed(); });
    $(".tool-example", root).addEventListener("click", () => { this.field("tools").value ||= TOOL_EXAMPLE; this.check(); changed(); });
    for (const preset of $$("[data-preset]", root)) {
      preset.addEventListener("click", () => {
        for (const name of NUMBERS.slice(0, 7)) this.field(name).value = "";
        if (preset.dataset.preset === "greedy") this.field("temperature").value = "0";
        changed();
      });
    }
  }

  field(name) { return $(`[name="${name}"]`, this.root); }

  /** Every field's text by its name, but for empty ones. */
  get values() {
    const found = $$("[name]", this.root).map((field) => [field.name, field.type === "checkbox" ? (field.checked ? "on" : "") : field.value]);
    return Object.fromEntries(found.filter(([, value]) => value !== ""));
  }

  set values(given) {
    for (const field of $$("[name]", this.root)) {
      if (field.type === "checkbox") field.checked = given[field.name] === "on";
      else field.value = given[field.name] ?? "";
    }
    this.show();
  }

  /** Shows what is in force where a field is empty. */
  suggest(card) {
    const own = card?.default_sampling_params ?? {};
    for (const [name, value] of Object.entries({ ...API_DEFAULTS, ...own })) {
      const field = this.field(name);
      if (!field) continue;
      field.placeholder = String(value);
      field.title = `Empty: ${value}, ${name in own ? "the model's own" : "as the API has it"}`;
    }
  }

  show() {
    const structured = this.field("format").value in EXAMPLES;
    $(".structured", this.root).hidden = !structured;
    $(".tidy", this.root).hidden = this.field("format").value !== "json_schema";
    this.check();
  }

  tidy() {
    const field = this.field("constraint");
    try { field.value = JSON.stringify(JSON.parse(field.value), null, 2); } catch { /* the note says where */ }
  }

  /** Whether it can be sent; says what cannot. */
  check() {
    let note = "";
    try { this.body(); } catch (error) { note = error.message; }
    $(".note", this.root).textContent = note;
    this.field("constraint").setAttribute("aria-invalid", String(note.startsWith("The schema")));
    this.field("tools").setAttribute("aria-invalid", String(note.startsWith("The tools")));
    return !note;
  }

  /** The request's fields. Throws an Error for what cannot be read. */
  body() {
    const body = {};
    for (const name of NUMBERS) {
      const text = this.field(name).value.trim();
      if (text !== "") body[name] = Number(text);
    }
    const stop = this.field("stop").value;
    if (stop) body.stop = [stop];
    const format = this.field("format").value;
    const constraint = this.field("constraint").value;
    if (format === "json_object") body.response_format = { type: "json_object" };
    else if (format === "json_schema") body.response_format = { type: "json_schema", json_schema: { name: "reply", schema: schema(constraint), strict: true } };
    else if (format === "choice") body.structured_outputs = { choice: constraint.split("\n").map((line) => line.trim()).filter(Boolean) };
    else if (format) body.structured_outputs = { [format]: constraint };
    const tools = this.field("tools").value.trim();
    if (tools) body.tools = toolsOf(tools);
    if (this.field("logprobs").checked) Object.assign(body, { logprobs: true, top_logprobs: 5 });
    return body;
  }
}

function parsed(text, what) {
  try { return JSON.parse(text); } catch (error) {
    const at = Number(error.message.match(/position (\d+)/)?.[1] ?? NaN);
    const line = Number.isNaN(at) ? "" : ` (line ${text.slice(0, at).split("\n").length})`;
    throw new Error(`${what} is not valid JSON${line}: ${error.message}`);
  }
}

function schema(text) {
  const found = parsed(text, "The schema");
  const wrong = wrongIn(found, "the schema");
  if (wrong) throw new Error(`The schema: ${wrong}`);
  return found;
}

/** The first thing that no JSON schema has, in words; the server knows the rest. */
function wrongIn(node, where) {
  if (typeof node === "boolean") return "";
  if (node === null || typeof node !== "object" || Array.isArray(node)) return `${where} must be an object.`;
  for (const type of [node.type].flat()) if (type !== undefined && !TYPES.has(type)) return `${where} has the unknown type ${JSON.stringify(type)}.`;
  if (node.required !== undefined && !(Array.isArray(node.required) && node.required.every((name) => typeof name === "string"))) return `"required" of ${where} must be a list of names.`;
  if (node.enum !== undefined && !(Array.isArray(node.enum) && node.enum.length)) return `"enum" of ${where} must be a list of values.`;
  for (const [name, one] of Object.entries(node.properties ?? {})) {
    const found = wrongIn(one, `property ${name}`);
    if (found) return found;
  }
  return node.items === undefined || Array.isArray(node.items) ? "" : wrongIn(node.items, `the items of ${where}`);
}

/** Tools as OpenAI takes them, from whole entries or functions alone. */
function toolsOf(text) {
  const found = parsed(text, "The tools' list");
  const list = Array.isArray(found) ? found : [found];
  return list.map((tool) => {
    const entry = tool?.type === "function" && tool.function ? tool : { type: "function", function: tool };
    if (typeof entry.function?.name !== "string") throw new Error("The tools: each needs a name.");
    return entry;
  });
}
