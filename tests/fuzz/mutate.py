"""Mutations of bytes and of JSON values: small steps from what is valid, because random noise is refused at the door."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

# Values that broke parsers before: edges of integers and floats, lone surrogates, deep nesting, odd Unicode.
INTERESTING: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, -(2**31), 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324, "", " ", "a", "\x00", "\ud800",
    "\U0010ffff", "\u202e", "a" * 300, "../../etc/passwd", "<|im_end|>", "</s>", "{{7*7}}", "%s%n", "${jndi:x}",
    [], {}, [[]], [None],
    {"": ""}, {"a": {"b": {"c": []}}}, "true", "1", "NaN", "default",
)  # fmt: skip
WORDS = (
    "a",
    "b",
    "type",
    "object",
    "properties",
    "$ref",
    "#/",
    "anyOf",
    "enum",
    "*",
    "+",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "\\",
    ".",
)


def mutate_bytes(rng: random.Random, data: bytes, most: int = 8) -> bytes:
    """Flips, inserts, removes, repeats and overwrites a few places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(6):
            case 0 if out:
                out[min(at, len(out) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                out[at:at] = rng.randbytes(rng.randint(1, 8))
            case 2:
                del out[at : at + rng.randint(1, 16)]
            case 3:
                end = at + rng.randint(1, 32)
                out[at:at] = out[at:end]
            case 4:
                size = rng.choice((1, 2, 4, 8))
                edge = rng.choice((0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (8 * size - 1) - 1))
                out[at : at + size] = edge.to_bytes(size, "little")
            case _:
                del out[at:]
    return bytes(out)


def mutate_json(rng: random.Random, value: Any, most: int = 4) -> Any:
    """A copy with a few places changed."""
    out = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        out = _mutate_at(rng, out, rng.randrange(6))
    return out


def _mutate_at(rng: random.Random, value: Any, depth: int) -> Any:
    if depth and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                del value[key]
            case 1:
                value[rng.choice((*WORDS, key + "x", key.upper()))] = random_json(rng, 2)
            case 2:
                value[key] = [value[key]] * rng.randint(0, 3)
            case _:
                value[key] = _mutate_at(rng, value[key], depth - 1)
        return value
    if depth and isinstance(value, list) and value:
        i = rng.randrange(len(value))
        match rng.randrange(6):
            case 0:
                del value[i]
            case 1:
                value += value[: rng.randint(1, 3)]
            case _:
                value[i] = _mutate_at(rng, value[i], depth - 1)
        return value
    if isinstance(value, str) and rng.random() < 0.5:
        at = rng.randrange(len(value) + 1)
        return value[:at] + rng.choice((*WORDS, "\ud800", "\x00", "é", "<|im_start|>")) + value[at:]
    if isinstance(value, int | float) and not isinstance(value, bool) and rng.random() < 0.5:
        return rng.choice((-value, value * 2, value + 1, value / 2, float(value)))
    return random_json(rng, 3)


def random_json(rng: random.Random, depth: int) -> Any:
    """Any JSON value, seldom a small one."""
    if depth and rng.random() < 0.3:
        if rng.random() < 0.5:
            return [random_json(rng, depth - 1) for _ in range(rng.randint(0, 4))]
        return {rng.choice(WORDS): random_json(rng, depth - 1) for _ in range(rng.randint(0, 4))}
    return copy.deepcopy(rng.choice(INTERESTING))


def many(rng: random.Random, value: Any) -> Any:
    """A copy in which one list, or one value, is very many: of equal elements, of lists in lists, or of numbers."""
    out = copy.deepcopy(value)
    if not isinstance(out, dict) or not out:
        return out
    key, count = rng.choice(list(out)), rng.choice((1000, 5000, 20_000))
    element = rng.choice(({}, [], "a", 1, 1.5, None, [1.5], [[]], {"a": {}}, {"type": "text", "text": "a"}))
    out[key] = rng.choice(
        ([element] * count, {str(i): element for i in range(count)}, [[element] * 10] * (count // 10), count**9)
    )
    return out


def dump(rng: random.Random, value: Any) -> bytes:
    """JSON text; sometimes damaged, sometimes far too deep."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.7)
    raw = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        return mutate_bytes(rng, raw)
    if rng.random() < 0.01:
        return b"[" * 50_000 + raw
    return raw


def mutate_text(rng: random.Random, text: str, words: tuple[str, ...] = WORDS) -> str:
    """Inserts, removes and repeats pieces of a text."""
    for _ in range(rng.randint(1, 5)):
        at, end = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        match rng.randrange(4):
            case 0:
                text = text[:at] + rng.choice(words) + text[at:]
            case 1:
                text = text[:at] + text[end:]
            case 2:
                text = text[:at] + text[at:end] * rng.randint(2, 6) + text[end:]
            case _:
                text = text[:at] + rng.choice(("\x00", "é", "\U0001f600", "\n", '"', "'")) + text[at:]
    return text[:20_000]
