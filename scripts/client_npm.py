"""The clients in JavaScript, for scripts/check_clients.py."""

from __future__ import annotations

import pathlib
import subprocess
import tempfile

NODE_ANTHROPIC = """
import Anthropic from '@anthropic-ai/sdk';
const client = new Anthropic({ baseURL: process.argv[2].replace(/\\/v1$/, ''), apiKey: 'none' });
const messages = [{ role: 'user', content: process.argv[3] }];
const common = { model: 'default', messages, max_tokens: 16 };
const message = await client.messages.create(common);
if (!message.content[0].text || !message.usage.output_tokens) throw new Error('no message');
const final = await client.messages.stream(common).finalMessage();
if (!final.content[0].text || !final.stop_reason) throw new Error('no stream');
if (!(await client.messages.countTokens({ model: 'default', messages })).input_tokens) throw new Error('no count');
try {
  await client.messages.create({ ...common, model: 'no-such-model' });
  throw new Error('an unknown model was served');
} catch (error) { if (error.status !== 404) throw error; }
"""
NODE_OLLAMA = """
import { Ollama } from 'ollama';
const client = new Ollama({ host: process.argv[2].replace(/\\/v1$/, '') });
const messages = [{ role: 'user', content: process.argv[3] }];
const common = { model: 'default', messages, options: { num_predict: 16 } };
if (!(await client.chat(common)).message.content) throw new Error('no content');
let text = '', last = null;
for await (const part of await client.chat({ ...common, stream: true })) { text += part.message.content; last = part; }
if (!text || !last.done || !last.eval_count) throw new Error('no stream');
if (!(await client.list()).models.length) throw new Error('no models');
"""
NODE = """
import OpenAI from 'openai';
const client = new OpenAI({ baseURL: process.argv[2], apiKey: 'none' });
const messages = [{ role: 'user', content: process.argv[3] }];
const reply = await client.chat.completions.create({ model: 'default', messages, max_tokens: 16 });
if (!reply.choices[0].message.content) throw new Error('no content');
let text = '', usage = null;
const options = { model: 'default', messages, max_tokens: 16, stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create(options)) {
  text += chunk.choices[0]?.delta?.content ?? '';
  usage = chunk.usage ?? usage;
}
if (!text || !usage?.completion_tokens) throw new Error('no stream');
const response = await client.responses.create({ model: 'default', input: process.argv[3], max_output_tokens: 16 });
if (!response.output_text) throw new Error('no response');
try {
  await client.chat.completions.create({ model: 'no-such-model', messages });
  throw new Error('an unknown model was served');
} catch (error) { if (error.status !== 404) throw error; }
"""


NPM = {"openai": NODE, "@anthropic-ai/sdk": NODE_ANTHROPIC, "ollama": NODE_OLLAMA}


def check_npm(url: str, node_modules: str, package: str) -> None:
    """One of the JavaScript clients: an answer, a stream, an error."""
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder) / "check.mjs"
        script.write_text(NPM[package])
        (pathlib.Path(folder) / "node_modules").symlink_to(pathlib.Path(node_modules).resolve())
        subprocess.run(["node", str(script), url, "Say hello in one short sentence."], check=True, timeout=300)
