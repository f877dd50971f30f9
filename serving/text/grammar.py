"""Structured output: grammars compiled once, and the token masks that hold a completion to them.

The work is llguidance's: JSON schema, regular expressions and context-free grammars over tokens, with a mask in tens of
microseconds. What it does not know to enforce it refuses, so a completion that ends by itself is valid.
"""

from __future__ import annotations

import collections
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
from llguidance.numpy import fill_next_token_bitmask_par

from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import RequestError, invalid

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer

PARAM = "structured_outputs"
MAX_CHARS = 1 << 18
# llguidance translates GBNF to Lark in Python, in time that grows with the square of the number of rules: 300 rules
# take 0.2 s, 1,000 take 2 s, 5,000 take minutes. Lark itself has no such limit: 200,000 characters take 1.5 s.
MAX_GBNF_RULES = 256
MAX_GBNF_CHARS = 1 << 16
CACHED_GRAMMARS = 64
# A grammar's lexer grows while it is used, by about 2 kB a state: 25,000 states are 50 MB, real schemas need some
# hundred. Errors without the parser's state: it would tell one client what another wrote.
LIMITS = {"max_lexer_states": 25_000, "verbose_errors": False}
JSON_OPTIONS = {
    # Blanks between JSON's parts, but not without end: small models at high temperature love to go on for ever.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
    # A schema's own "x-guidance" may not switch these on: they would accept what the schema forbids.
    "coerce_one_of": False,
    "lenient": False,
}
PARALLEL_ROWS = 4
"""From this many masks on they are computed in parallel: fewer finish (some 10 µs each) before threads wake up."""

ConstraintFactory = Callable[[], TokenConstraint]


class GrammarCompiler:
    """Compiles constraints for one model. Thread-safe; calls block, so keep them off an event loop.

    Args:
        tokenizer: the model's.
        vocab_size: width of the model's logits; token ids beyond the tokenizer's are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, cache_size: int = CACHED_GRAMMARS) -> None:
        self._tokenizer = tokenizer
        self._width = max(vocab_size, tokenizer.vocab_size)
        self._limits = LLParserLimits(**LIMITS)
        self._compiled: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache: collections.OrderedDict[str, LLMatcher] = collections.OrderedDict()
        self._cache_size = cache_size

    def warm(self) -> None:
        """Indexes the vocabulary (0.3 s for 49,000 tokens, 3 s for 262,000), which the first compilation needs."""
        self._vocabulary()

    def compile(self, wanted: StructuredOutputs) -> ConstraintFactory:
        """A maker of fresh constraints, one a completion. Compiled once for equal constraints.

        Raises:
            RequestError: INVALID_ARGUMENT: malformed, too large, or using what cannot be enforced (it is named).
        """
        try:
            return self._from_source(*_source(wanted))
        except RecursionError:
            raise invalid("The constraint is nested too deeply.", PARAM) from None

    def compile_tools(self, lark: str) -> ConstraintFactory:
        """The same for a grammar made by `tools.plan_tools`; errors are about the request's tools."""
        try:
            return self._from_source("tools", lark)
        except RequestError as error:
            raise invalid(error.message, "tools") from None

    def _from_source(self, kind: str, text: str) -> ConstraintFactory:
        if len(text) > MAX_CHARS:
            raise invalid(f"The {kind} has {len(text)} characters; at most {MAX_CHARS} are compiled.", PARAM)
        key = hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            matcher = self._cache.get(key)
            if matcher is not None:
                self._cache.move_to_end(key)
        if matcher is None:
            # Two equal requests at once compile twice; both take a millisecond.
            matcher = self._build(kind, text)
            with self._lock:
                self._cache[key] = matcher
                while len(self._cache) > self._cache_size:
                    self._cache.popitem(last=False)
        eos = frozenset(self._tokenizer.eos_token_ids)
        found = matcher
        return lambda: GrammarConstraint(found.deep_copy(), eos, self._width)

    def _build(self, kind: str, text: str) -> LLMatcher:
        try:
            if kind == "JSON schema":
                grammar = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
            elif kind == "regex":
                grammar = LLMatcher.grammar_from_regex(text)
            else:
                grammar = LLMatcher.grammar_from_lark(_from_gbnf(text) if "::=" in text else text)
        except (RecursionError, RequestError):
            raise
        except Exception as error:  # the converter raises several kinds of its own
            raise invalid(f"The {kind} cannot be read: {_brief(str(error))}.", PARAM) from None
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        return matcher

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._compiled is None:
                self._compiled = LLTokenizer(
                    self._tokenizer.hf_json(), n_vocab=self._width, eos_token=list(self._tokenizer.eos_token_ids)
                )
            return self._compiled


class GrammarConstraint:
    """The state of one completion in its grammar: a `TokenConstraint`. Used by one thread at a time."""

    __slots__ = ("_ended", "_eos", "_matcher", "_num_bytes")

    def __init__(self, matcher: LLMatcher, eos_token_ids: frozenset[int], width: int) -> None:
        self._matcher = matcher
        self._eos = eos_token_ids
        self._num_bytes = (width + 31) // 32 * 4
        self._ended = False

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """See `TokenConstraint.fill_mask`. A row wider or narrower than the grammar's vocabulary is cut or zeroed."""
        if mask_W.nbytes == self._num_bytes and mask_W.flags.c_contiguous:
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, self._num_bytes)
        else:
            own = np.zeros(self._num_bytes // 4, np.int32)
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, self._num_bytes)
            _fit(own, mask_W)
        self.check()

    def check(self) -> None:
        """Raises RuntimeError once the grammar grew too complex to go on."""
        if self._matcher.is_error():
            raise RuntimeError(_brief(self._matcher.get_error()))

    def accept(self, token: int) -> bool:
        """See `TokenConstraint.accept`."""
        # The matcher's own notion of end-of-sequence is not counted by its other methods, so it never sees one.
        if token in self._eos:
            self._ended = self._ended or self._matcher.is_accepting()
            return self._ended
        return not self._ended and self._matcher.try_consume_tokens([token]) == 1

    @property
    def finished(self) -> bool:
        """See `TokenConstraint.finished`."""
        return self._ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    @staticmethod
    def fill_masks(items: Sequence[tuple[GrammarConstraint, int]], mask_RW: np.ndarray) -> dict[int, str]:
        """Fills many rows of one mask at once, in parallel where that is faster.

        Args:
            items: (constraint, row), each constraint once.
            mask_RW: int32 [rows, ceil(vocab / 32)], C-contiguous; other rows stay as they are.
        Returns:
            row -> sentence, for constraints that cannot go on.
        """
        parallel = [(constraint, row) for constraint, row in items if constraint._num_bytes == mask_RW.shape[1] * 4]
        failed: dict[int, str] = {}
        if len(parallel) >= PARALLEL_ROWS and mask_RW.flags.c_contiguous:
            fill_next_token_bitmask_par(_executor(), [(c._matcher, row) for c, row in parallel], mask_RW)
        else:
            parallel = []
        done = {row for _, row in parallel}
        for constraint, row in items:
            try:
                if row in done:
                    constraint.check()
                else:
                    constraint.fill_mask(mask_RW[row])
            except RuntimeError as error:
                failed[row] = str(error)
        return failed


_EXECUTOR: LLExecutor | None = None


def _executor() -> LLExecutor:
    global _EXECUTOR
    if _EXECUTOR is None:
        _EXECUTOR = LLExecutor(min(8, os.cpu_count() or 1))
    return _EXECUTOR


def _fit(own: np.ndarray, row_W: np.ndarray) -> None:
    size = min(len(own), len(row_W))
    row_W[:size] = own[:size]
    row_W[size:] = 0


def _source(wanted: StructuredOutputs) -> tuple[str, str]:
    """(kind, text) of a constraint, as the compiler takes it."""
    if wanted.json is not None:
        return "JSON schema", json.dumps(_schema(wanted.json))
    if wanted.json_object:
        return "JSON schema", '{"type": "object"}'
    if wanted.regex is not None:
        return "regex", wanted.regex
    if wanted.choice is not None:
        if not wanted.choice or not all(isinstance(text, str) and text for text in wanted.choice):
            raise invalid("choice takes non-empty strings, at least one.", PARAM)
        return "choice", "start: " + " | ".join(lark_string(text) for text in wanted.choice)
    assert wanted.grammar is not None
    return "grammar", wanted.grammar


def _from_gbnf(text: str) -> str:
    rules = text.count("::=")
    if rules > MAX_GBNF_RULES or len(text) > MAX_GBNF_CHARS:
        raise invalid(
            f"The GBNF grammar has {rules} rules and {len(text)} characters; at most {MAX_GBNF_RULES} and "
            f"{MAX_GBNF_CHARS} are compiled. Write it in Lark, which has no such limit.",
            PARAM,
        )
    return any_to_lark(text)


def lark_string(text: str) -> str:
    """`text` as a string literal of the Lark dialect."""
    return json.dumps(text, ensure_ascii=False)


def _schema(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    schema: Any = given
    if isinstance(given, str):
        try:
            schema = json.loads(given)
        except ValueError as error:
            raise invalid(f"The JSON schema is not JSON: {error}.", PARAM) from None
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise invalid(f"A JSON schema is an object, got {json.dumps(schema)[:40]}.", PARAM)
    return schema


def _refusal(kind: str, message: str) -> RequestError:
    """The compiler's error as a sentence about the request."""
    unknown = re.search(r"Unimplemented keys: \[(.*?)\]", message)
    if unknown:
        keys = unknown[1].replace('"', "")
        return invalid(f"The {kind} uses {keys}, which cannot be enforced. Leave it out or say it differently.", PARAM)
    if "oneOf constraints" in message:
        return invalid(
            f"The {kind} uses oneOf with alternatives that may overlap, which cannot be enforced. Use anyOf, or give "
            "each alternative a required property with a const of its own.",
            PARAM,
        )
    return invalid(f"The {kind} cannot be used: {_brief(message)}.", PARAM)


def _brief(message: str) -> str:
    """The first lines of a message, on one line and not too long."""
    flat = " ".join(message.split())
    return (flat[:400] + " ..." if len(flat) > 400 else flat).rstrip(".")
