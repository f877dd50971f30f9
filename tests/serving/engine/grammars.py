"""Real grammars for tests that run tiny models: schemas, expressions, choices and tool calls over a vocabulary of 256 bytes."""

from __future__ import annotations

import functools

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.sampling_params import StructuredOutputs
from serving.text.grammar import ConstraintFactory, GrammarCompiler
from serving.text.tokenizer import Tokenizer
from serving.text.tools.choice import plan_tools
from tests.tiny import VOCAB

END = 0
"""The token that ends a completion."""

THING = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["red", "reddish", "blue"]},
        "n": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["kind", "n", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": THING}} for name in ("paint", "paint_over", "look")
]
WANTED = (
    StructuredOutputs(json=THING),
    StructuredOutputs(regex="(ab|abc){2,6}-[0-9]{2,8}"),
    StructuredOutputs(choice=("paint", "painted", "paint it blue, or red")),
    StructuredOutputs(json_object=True),
)


@functools.cache
def tokenizer() -> Tokenizer:
    """Token i is a byte, but for the first, which ends a completion."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 1]
    made = tokenizers.Tokenizer(models.BPE({"<end>": END} | {byte: i + 1 for i, byte in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(made, eos_token_ids=(END,))


@functools.cache
def factories() -> tuple[ConstraintFactory, ...]:
    """Makers of constraints: those of WANTED, a required call of one of TOOLS, and a named one."""
    compiler = GrammarCompiler(tokenizer(), VOCAB)
    named = {"type": "function", "function": {"name": "paint_over"}}
    calls = (plan_tools(TOOLS, choice, None, tokenizer()).grammar for choice in ("required", named))
    return (*map(compiler.compile, WANTED), *(compiler.compile_tools(call) for call in calls if call is not None))


def constraints() -> list[TokenConstraint]:
    """One of each, at its beginning."""
    return [make() for make in factories()]
