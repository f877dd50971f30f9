"""How a completion's tokens are chosen and when it ends. Names, ranges and defaults are vLLM's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.errors import invalid

# Bounds that keep one request from taking the server with it. Other sizes that depend on the served model
# (context length, vocabulary) are checked in serving/service/requests/limits.py.
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_CHARS = 1024
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 1024
GREEDY_TEMPERATURE = 1e-5
HOTTEST = 1e4
"""A temperature at which every token is as likely as another; higher ones, and stronger repetition penalties, count as this: their
numbers go to devices in 16 bits."""
MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """A constraint on the text of a completion: exactly one of the fields is set.

    Attributes:
        json: a JSON schema, as a mapping or as JSON text.
        json_object: True for any JSON object.
        regex: a regular expression that the whole completion matches.
        choice: the completion is one of these strings.
        grammar: a grammar in Lark or GBNF syntax.
    """

    json: Mapping[str, Any] | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) not in (None, False)]
        if len(given) != 1:
            raise invalid(
                f"structured_outputs takes exactly one of json, json_object, regex, choice, grammar; got {given}.",
                "structured_outputs",
            )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    Attributes:
        n: completions per prompt, 1..128.
        temperature: >= 0; below 1e-5 is greedy.
        top_k: keep the k most likely tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p, in (0, 1].
        min_p: drop tokens less likely than min_p times the most likely one, in [0, 1].
        seed: same seed, same tokens, whatever else is in the batch. None draws one at admission.
        repetition_penalty: > 0; divides (multiplies) positive (negative) logits of tokens seen in prompt or completion.
        presence_penalty: [-2, 2]; subtracted from the logits of tokens seen in the completion.
        frequency_penalty: [-2, 2]; the same, times the token's count.
        logit_bias: token id -> value added to its logit, clamped to [-100, 100].
        allowed_token_ids: only these ids may be sampled.
        bad_words: texts that may not be produced.
        min_tokens: end-of-sequence and stop tokens cannot be sampled before this many tokens.
        max_tokens: at most this many tokens; None means up to the context's end.
        stop: strings that end the completion.
        stop_token_ids: token ids that end the completion.
        include_stop_str_in_output: keep the stop string in the text.
        ignore_eos: go on after the end-of-sequence token.
        logprobs: return the sampled token's logprob and those of this many likeliest tokens, 0..20; None for none.
        prompt_logprobs: the same for every prompt token but the first.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: accepted for compatibility.
        detokenize: False returns token ids alone.
        structured_outputs: a grammar for the completion.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    min_tokens: int = 0
    max_tokens: int | None = 16
    stop: Sequence[str] | str | None = None
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    structured_outputs: StructuredOutputs | None = None

    def __post_init__(self) -> None:
        """Normalizes sequences to tuples and checks every range.

        Raises:
            RequestError: INVALID_ARGUMENT naming the field, its value and its limit.
        """
        put = object.__setattr__
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        put(self, "stop", stop)
        put(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        put(self, "bad_words", tuple(self.bad_words or ()))
        if self.allowed_token_ids is not None:
            put(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is not None:
            put(self, "logit_bias", _clean_logit_bias(self.logit_bias))
        self._check()
        for name in ("temperature", "repetition_penalty"):
            if getattr(self, name) > HOTTEST:
                put(self, name, HOTTEST)

    def _check(self) -> None:
        _whole("n", self.n, 1, MAX_N)
        _real("temperature", self.temperature, 0.0, math.inf)
        _whole("top_k", self.top_k, -1, 2**31 - 1)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _whole("seed", self.seed, -MAX_SEED - 1, MAX_SEED)
        _whole("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise invalid(f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}.", "min_tokens")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _whole(name, value, 0, MAX_LOGPROBS)
        _strings("stop", self.stop_strings, MAX_STOP_STRINGS, MAX_STOP_STRING_CHARS)
        _strings("bad_words", tuple(self.bad_words), MAX_BAD_WORDS, MAX_STOP_STRING_CHARS)
        _ids("stop_token_ids", tuple(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                raise invalid("allowed_token_ids is empty: nothing could be sampled.", "allowed_token_ids")
            _ids("allowed_token_ids", tuple(self.allowed_token_ids), None)
        if self.stop_strings and not self.detokenize:
            raise invalid("stop strings need detokenize=True.", "stop")
        if self.n > 1 and self.greedy:
            raise invalid(f"n is {self.n}, but greedy decoding (temperature 0) has one answer.", "n")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        return tuple(self.stop or ())

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


_DIGITS = re.compile(r"-?[0-9]{1,64}")


def _clean_logit_bias(bias: Mapping[Any, float]) -> dict[int, float]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise invalid(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS} are taken.", "logit_bias")
    clean: dict[int, float] = {}
    for key, value in bias.items():
        try:
            if isinstance(key, str) and not _DIGITS.fullmatch(
                key
            ):  # int() reads "5_0", " 5" and other alphabets' digits too
                raise ValueError(key)
            token = int(key)
            number = float(value)
        except (TypeError, ValueError):
            raise invalid(f"logit_bias maps token ids to numbers; got {key!r}: {value!r}.", "logit_bias") from None
        if token < 0 or math.isnan(number):
            raise invalid(f"logit_bias maps token ids to numbers; got {token}: {number}.", "logit_bias")
        clean[token] = min(100.0, max(-100.0, number))
    return clean


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(f"{name} must be a whole number, got {value!r}.", name)
    if not low <= value <= high:
        raise invalid(f"{name} must be between {low} and {high}, got {value}.", name)


def _real(name: str, value: Any, low: float, high: float, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(f"{name} must be a number, got {value!r}.", name)
    bad = math.isnan(value) or math.isinf(value) or value < low or value > high or (open_low and value == low)
    if bad:
        bound = f"more than {low:g}" if open_low else f"at least {low:g}"
        upper = f" and at most {high:g}" if high != math.inf else " and finite"
        raise invalid(f"{name} must be {bound}{upper}, got {value}.", name)


def _strings(name: str, values: tuple[Any, ...], count: int, chars: int) -> None:
    if len(values) > count:
        raise invalid(f"{name} has {len(values)} strings; at most {count} are taken.", name)
    for value in values:
        if not isinstance(value, str) or not value:
            raise invalid(f"{name} takes non-empty strings, got {value!r}.", name)
        if len(value) > chars:
            raise invalid(f"a string in {name} has {len(value)} characters; at most {chars} are taken.", name)


def _ids(name: str, values: tuple[Any, ...], count: int | None) -> None:
    if count is not None and len(values) > count:
        raise invalid(f"{name} has {len(values)} ids; at most {count} are taken.", name)
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise invalid(f"{name} takes token ids (whole numbers from 0), got {value!r}.", name)
