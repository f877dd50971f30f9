"""Files and texts that a server reads: weights, configurations, tokenizers, templates, schemas, expressions, grammars.

What is wrong with them must be said by a ValueError (RequestError for what a client sends); anything else is a defect.
"""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Iterable
from typing import Any

import numpy as np

from serving.engine.api.constraint import TooComplexError
from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import ErrorKind, RequestError
from tests.fuzz import media, vocabularies
from tests.fuzz.mutate import WORDS, mutate_bytes, mutate_json, mutate_text, random_json
from tests.fuzz.run import Case

HF = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
    "sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"], "eos_token_id": [1, 2],
}  # fmt: skip


def write_gguf(path: pathlib.Path) -> bytes:
    """A small valid file; its bytes."""
    import gguf

    from tests.serving.text.vocabularies import byte_level_metadata

    writer = gguf.GGUFWriter(path, "llama")
    for key, value in byte_level_metadata(size=300).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
        add[type(value)](key, value)
    for name in ("token_embd.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.ones((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_files(folder: pathlib.Path) -> Case:
    """Headers, metadata and tensors of GGUF files, and the tokenizer in them."""
    from models.loading.gguf.file import GGUFFile
    from serving.text.tokenizer import Tokenizer

    path = folder / "base.gguf"
    base = write_gguf(path)
    tensors = base.rindex(b"blk.0.attn_q.weight")

    def case(rng: random.Random) -> Iterable[str]:
        if rng.random() < 0.5:  # in the header and what describes the tensors, which random places seldom hit
            at = rng.choice((0, tensors - 100))
            data = base[:at] + mutate_bytes(rng, base[at : at + 200]) + base[at + 200 :]
        else:
            data = mutate_bytes(rng, base)
        path.write_bytes(data)
        try:
            file = GGUFFile(path)
            for name in list(file.tensors)[:4]:
                file.read(name)
            Tokenizer.from_gguf(file.metadata).decode([1, 2, 3])
        except ValueError as error:
            return [str(error)]
        return []

    return case


def safetensors_files(folder: pathlib.Path) -> Case:
    """Headers of safetensors files, well framed and not."""
    from models.loading.files.safetensors import SafetensorsFile

    path = folder / "model.safetensors"
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]},
        "b": {"dtype": "BF16", "shape": [8], "data_offsets": [32, 48]},
        "c": {"dtype": "I8", "shape": [], "data_offsets": [48, 49]},
    }

    def case(rng: random.Random) -> Iterable[str]:
        raw = json.dumps(mutate_json(rng, header)).encode("utf-8", "surrogatepass")
        size = len(raw) if rng.random() < 0.9 else rng.choice((0, 1, 2**32, 2**63, 2**64 - 1, len(raw) + 8))
        data = size.to_bytes(8, "little") + raw + bytes(rng.choice((49, 49, 0, 10, 64)))
        path.write_bytes(mutate_bytes(rng, data, 2) if rng.random() < 0.2 else data)
        try:
            file = SafetensorsFile(path)
            for name in list(file.tensors)[:4]:
                file.read(name)
        except ValueError as error:
            return [str(error)]
        return []

    return case


def configs(folder: pathlib.Path) -> Case:
    """config.json, through the families' own readers."""
    from models import registry

    names = [name for family in registry.families() for name in family.architectures]

    def case(rng: random.Random) -> Iterable[str]:
        hf = mutate_json(rng, HF)
        if not isinstance(hf, dict):
            return [""]
        name = rng.choice(names)
        hf["architectures"] = [name]
        try:
            registry.find(name).config(hf)
        except ValueError as error:
            return [str(error)]
        return []

    return case


def tokenizer_files(folder: pathlib.Path) -> Case:
    """tokenizer.json and tokenizer_config.json."""
    from serving.text.tokenizer import Tokenizer
    from tests.serving.text.vocabularies import byte_level

    base = json.loads(byte_level().hf_json if isinstance(byte_level().hf_json, str) else byte_level().hf_json())  # type: ignore[operator]
    small = {**base, "added_tokens": base["added_tokens"][:4]}
    settings = {
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "add_bos_token": True,
        "chat_template": "{{ messages }}",
        "added_tokens_decoder": {"0": {"content": "<|endoftext|>", "special": True}}, "model_max_length": 10**30,
    }  # fmt: skip

    def case(rng: random.Random) -> Iterable[str]:
        which = rng.random()
        made = mutate_json(rng, small) if which < 0.6 else small
        raw = json.dumps(made).encode()
        (folder / "tokenizer.json").write_bytes(mutate_bytes(rng, raw) if which > 0.9 else raw)
        (folder / "tokenizer_config.json").write_text(
            json.dumps(mutate_json(rng, settings) if which > 0.4 else settings)
        )
        try:
            tokenizer = Tokenizer.from_directory(folder)
        except ValueError as error:
            return [str(error)]
        try:
            tokenizer.decode(tokenizer.encode("Hello <|im_end|> wörld"))
        except (
            BaseException
        ) as error:  # in a request this ends the request: tests/serving/service/test_one_bad_request.py
            if type(error).__name__ != "PanicException":
                raise
        return []

    return case


def _grammar(folder: pathlib.Path, make: Any) -> Case:
    from serving.text.grammar import GrammarCompiler
    from tests.serving.text.vocabularies import byte_level

    tokenizer = byte_level()
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size)
    width = -(-tokenizer.vocab_size // 32)

    def case(rng: random.Random) -> Iterable[str]:
        try:
            constraint = compiler.compile(make(rng))()
            for _ in range(4):
                mask = np.full(width, -1, np.int32)
                constraint.fill_mask(mask)
                allowed = [t for t in range(tokenizer.vocab_size) if (int(mask[t // 32]) >> (t % 32)) & 1]
                if not allowed or not constraint.accept(rng.choice(allowed)) or constraint.finished:
                    break
        except RequestError as error:
            assert error.kind is ErrorKind.INVALID_ARGUMENT, error.kind
            return [error.message]
        except TooComplexError as error:  # ends its request
            return [str(error)]
        return []

    return case


SCHEMA = {
    "type": "object", "required": ["name", "n", "kind"], "additionalProperties": False, "$defs": {"x": {"enum": ["a", 1, None]}},
    "properties": {"name": {"type": "string", "pattern": "^[a-z]{1,8}$", "maxLength": 10}, "n": {"type": "integer", "minimum": 0},
                   "list": {"type": "array", "items": {"$ref": "#/$defs/x"}, "minItems": 1, "maxItems": 3},
                   "any": {"anyOf": [{"type": "null"}, {"type": "number", "multipleOf": 0.5}]}, "at": {"format": "date-time"},
                   "kind": {"enum": ["a", "b"]}, "not": {"$id": "urn:n", "enum": ["a", "b", 1], "not": {"const": "b"}},
                   "way": {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?0*\\d*\\.?\\d*$"}},
    "if": {"properties": {"kind": {"const": "a"}}, "required": ["kind"]},
    "then": {"required": ["list"]}, "else": {"required": ["at"]},
}  # fmt: skip
REGEXES = (
    r"[a-z]{2,5}\d+(foo|bar)?",
    r"(a|b)*c{3}",
    r"\w+@\w+\.(com|org)",
    r"^(?:\d{1,3}\.){3}\d{1,3}$",
    "(x+x+)+y",
    "é{2}[^a-c]",
)
REPEATS = (
    *WORDS,
    "{9,99}",
    "{0,100}",
    "{1000000000}",
    "){1,40}",
    "((((",
    "?{500}",
    "(?i)",
    r"\p{L}",
    ".*",
    r"(\w{1,40} ?){1,60}",
    "(?=a)",
    "(?!.*b)",
    "(?<=",
)
LARK = 'start: greeting " " name\ngreeting: "hello" | "hi"\nname: /[a-z]+/\n%ignore / /\n'
GBNF = 'root ::= greeting " " name\ngreeting ::= "hello" | "hi"\nname ::= [a-z]+ | "(" root ")"\n'


def schemas(folder: pathlib.Path) -> Case:
    """JSON schemas."""

    def make(rng: random.Random) -> StructuredOutputs:
        schema = mutate_json(rng, SCHEMA) if rng.random() < 0.9 else random_json(rng, 4)
        return StructuredOutputs(
            json=json.dumps(schema) if rng.random() < 0.5 or not isinstance(schema, dict) else schema
        )

    return _grammar(folder, make)


def regexes(folder: pathlib.Path) -> Case:
    """Regular expressions."""
    return _grammar(
        folder,
        lambda rng: StructuredOutputs(regex=mutate_text(rng, rng.choice(REGEXES), REPEATS) or "a"),
    )


def grammars(folder: pathlib.Path) -> Case:
    """Lark and GBNF grammars."""
    doubled = "".join(f"\nR{i}: R{i + 1} R{i + 1}" for i in range(24)) + '\nR24: "a"\n'
    words = (*WORDS, "start", "root", "::=", ":", "/", "%", "~", "{1,3}", "{1000000}", "R0", "NAME{100}{100}", doubled)
    return _grammar(
        folder, lambda rng: StructuredOutputs(grammar=mutate_text(rng, rng.choice((LARK, GBNF)), words) or "a")
    )


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content | trim }}{% else %}{{ m['content'] }}{% endif %}"
    "<|im_end|>{% endfor %}{% set ns = namespace(x=0) %}{% for t in tools or [] %}{{ t | tojson }}{% set ns.x = ns.x + 1 %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}{{ raise_exception('no') if ns.x > 3 }}"
)
JINJA = (
    "{{", "}}", "{%", "%}", "{% for i in range(10**9) %}", "{% endfor %}", "{% include 'x' %}", "{{ ''.__class__ }}", "| tojson",
    "{{ messages.__class__.__mro__ }}", "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "{{ 'a' * 10**9 }}", "| format",
    "{{ cycler.__init__.__globals__ }}", "{{ (9**9**9) }}", "{% set x = x ~ x %}", "loop.index", "strftime_now('%Y')", "[",
    "(", "'",
)  # fmt: skip


def templates(folder: pathlib.Path) -> Case:
    """Chat templates (an operator's, or a checkpoint's) and the messages that go through them."""
    from serving.text.chat_template import ChatTemplate, TemplateLimits
    from tests.serving.text.vocabularies import byte_level

    tokenizer = byte_level()
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
        {"role": "tool", "content": [{"type": "text", "text": "x"}]},
    ]
    good = ChatTemplate(TEMPLATE, tokenizer)

    def case(rng: random.Random) -> Iterable[str]:
        try:
            if rng.random() < 0.5:
                template = ChatTemplate(
                    mutate_text(rng, TEMPLATE, JINJA), tokenizer, limits=TemplateLimits(2.0, 100_000)
                )
                template.render(messages, tools=[{"type": "function"}])
            else:
                given = mutate_json(rng, messages)
                good.encode(tokenizer, given if isinstance(given, list) else [given])
        except ValueError as error:
            return [str(error)]
        except RequestError as error:
            assert error.kind is ErrorKind.INVALID_ARGUMENT
            return [error.message]
        return []

    return case


TARGETS = {
    **media.TARGETS,
    **vocabularies.TARGETS,
    "gguf": gguf_files, "safetensors": safetensors_files, "config": configs, "tokenizer": tokenizer_files, "schema": schemas,
    "regex": regexes, "grammar": grammars, "template": templates,
}  # fmt: skip
