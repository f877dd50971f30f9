"""Structured output: grammars compiled once, and the token masks that hold a completion to them.

The work is llguidance's: JSON schema, regular expressions and context-free grammars over tokens, with a mask in tens of
microseconds. What it does not know to enforce it refuses, so a completion that ends by itself is valid.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask_par

from serving.engine.api.constraint import TokenConstraint, TooComplexError
from serving.engine.api.sampling_params import StructuredOutputs
from serving.errors import RequestError, invalid
from serving.text.constraints.held import Held, HeldGrammars
from serving.text.constraints.schema import prepare
from serving.text.constraints.schema_rules import check_repeats
from serving.text.constraints.sources import PARAM, check, check_lark, from_gbnf, lark_string, refusal, schema_of

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer

MAX_CHARS = 1 << 18
CACHED_GRAMMARS = 512
CACHED_BYTES = 96 << 20
LIVE_BYTES = 256 << 20
MAX_LEXER_STATES = 12_000
# A grammar's lexer grows while it is used, by about 1.3 kB a state: see `held`. Real schemas need some hundred.
# Errors without the parser's state: it would tell one client what another wrote.
LIMITS = {"max_lexer_states": MAX_LEXER_STATES, "max_grammar_size": 250_000, "verbose_errors": False}
TRIAL_TOKENS = 3
"""Masks that are made before a grammar is taken: most that grow too complex do so within the first few."""
JSON_OPTIONS = {
    # Blanks between JSON's parts, but not without end: small models at high temperature love to go on for ever.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}",
    # A schema's own "x-guidance" may not switch these on: they would accept what the schema forbids.
    "coerce_one_of": False,
    "lenient": False,
}
NO_FORCING = '\n%llguidance {"no_forcing": true}'
"""Where only one text can follow, llguidance would take the tokens that the tokenizer makes of it, and it takes markers in a text
("<think>" in an enum) for the control tokens, which the grammar then refuses. So every spelling of the text is allowed."""
PARALLEL_ROWS = 4
"""From this many masks on they are computed in parallel: fewer finish (some 10 µs each) before threads wake up."""
GROWTH_SECONDS = 0.02
"""CPU time of one grammar's masks after which its growth is looked at again: a megabyte or so."""

ConstraintFactory = Callable[[], TokenConstraint]


class GrammarCompiler:
    """Compiles constraints for one model. Thread-safe; calls block, so keep them off an event loop.

    Args:
        tokenizer: the model's.
        vocab_size: width of the model's logits; token ids beyond the tokenizer's are never allowed.
        cache_size, cache_bytes: how many compiled grammars are kept, and how much memory they may hold.
        live_bytes: how much all may hold, those in use by completions included.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        cache_size: int = CACHED_GRAMMARS,
        cache_bytes: int = CACHED_BYTES,
        live_bytes: int = LIVE_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._width = max(vocab_size, tokenizer.vocab_size)
        self._limits = LLParserLimits(**LIMITS)
        self._compiled: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._cache = HeldGrammars(cache_size, cache_bytes, live_bytes)

    def warm(self) -> None:
        """Indexes the vocabulary (0.3 s for 49,000 tokens, 3 s for 262,000), which the first compilation needs."""
        self._vocabulary()

    @property
    def is_warm(self) -> bool:
        """Whether the vocabulary is indexed."""
        return self._compiled is not None

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
        if not text.isascii() and text.encode(errors="replace").decode() != text:
            raise invalid(f"The {kind} holds half of a character (a lone surrogate), which is no text.", PARAM)
        if len(text) > MAX_CHARS:
            raise invalid(f"The {kind} has {len(text)} characters; at most {MAX_CHARS} are compiled.", PARAM)
        key = hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).hexdigest()
        held = self._cache.get(key)
        if held is None:
            # Two equal requests at once compile twice; both take a millisecond.
            held = Held(self._build(kind, text), len(text), MAX_LEXER_STATES)
            self._cache.put(key, held)
        eos = frozenset(self._tokenizer.eos_token_ids)
        found, grew = held, self._cache.grew
        return lambda: GrammarConstraint(found.matcher.deep_copy(), eos, self._width, found, grew)

    def _build(self, kind: str, text: str) -> LLMatcher:
        try:
            if kind == "JSON schema":
                made = LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
                text = f"start: %json {json.dumps(json.loads(made)['grammars'][0]['json_schema'])}"
            elif kind == "regex":
                text = json.loads(LLMatcher.grammar_from_regex(text))["grammars"][0]["lark_grammar"]
            grammar = LLMatcher.grammar_from_lark(text + NO_FORCING)
        except (RecursionError, RequestError):
            raise
        except Exception as error:
            raise refusal(kind, str(error)) from None
        matcher = LLMatcher(self._vocabulary(), grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise refusal(kind, matcher.get_error())
        for end in (0, -1):
            self._try_out(kind, matcher.deep_copy(), end)
        return matcher

    def _try_out(self, kind: str, matcher: LLMatcher, which: int) -> None:
        """Refuses what cannot go on after a few tokens: said now it is the client's, later it would be a failure.

        Args:
            which: of the allowed tokens in their order, the one to go on with.
        """
        mask = np.zeros((self._width + 31) // 32, np.int32)
        ends = frozenset(self._tokenizer.eos_token_ids)
        for _ in range(TRIAL_TOKENS):
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
            if matcher.is_error():
                raise refusal(kind, matcher.get_error())
            allowed = np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0]
            allowed = allowed[~np.isin(allowed, list(ends))]
            if not len(allowed) or not matcher.try_consume_tokens([int(allowed[which])]):
                return

    def _vocabulary(self) -> LLTokenizer:
        with self._lock:
            if self._compiled is None:
                self._compiled = LLTokenizer(
                    self._tokenizer.hf_json(), n_vocab=self._width, eos_token=list(self._tokenizer.eos_token_ids)
                )
            return self._compiled


class GrammarConstraint:
    """The state of one completion in its grammar: a `TokenConstraint`. Used by one thread at a time."""

    __slots__ = ("_ended", "_eos", "_grew", "_held", "_matcher", "_num_bytes", "_seen")

    def __init__(
        self,
        matcher: LLMatcher,
        eos_token_ids: frozenset[int],
        width: int,
        held: Held,
        grew: Callable[[Held], str | None],
    ) -> None:
        self._matcher = matcher
        self._eos = eos_token_ids
        self._num_bytes = (width + 31) // 32 * 4
        self._ended = False
        self._held, self._grew = held, grew
        self._seen = held.seconds

    def fill_mask(self, mask_W: np.ndarray) -> None:
        """See `TokenConstraint.fill_mask`. A row wider or narrower than the grammar's vocabulary is cut or zeroed."""
        began = time.thread_time()
        if mask_W.nbytes == self._num_bytes and mask_W.flags.c_contiguous:
            self._matcher.unsafe_compute_mask_ptr(mask_W.ctypes.data, self._num_bytes)
        else:
            own = np.zeros(self._num_bytes // 4, np.int32)
            self._matcher.unsafe_compute_mask_ptr(own.ctypes.data, self._num_bytes)
            _fit(own, mask_W)
        self.charge(time.thread_time() - began)
        self.check()

    def fill_ahead(self, drafts: Sequence[int], mask_QW: np.ndarray) -> None:
        """See `TokenConstraint.fill_ahead`."""
        taken = 0
        try:
            for place, token in enumerate(drafts):
                self.fill_mask(mask_QW[place])
                # A token that is consumed in vain spoils the matcher for ever: it is only tried.
                if token in self._eos or self.finished or self._matcher.validate_tokens([token]) != 1:
                    return
                self._matcher.try_consume_tokens([token])
                taken += 1
            self.fill_mask(mask_QW[len(drafts)])
        finally:
            if taken:
                self._matcher.rollback(taken)

    def charge(self, seconds: float) -> None:
        """Counts the CPU time of a mask towards what the grammar holds.

        Raises:
            TooComplexError: all grammars together hold too much, and this one is among the largest.
        """
        held = self._held
        held.seconds += seconds
        if held.seconds - self._seen >= GROWTH_SECONDS:
            self._seen = held.seconds
            if refused := self._grew(held):
                raise TooComplexError(f"The constraint is too complex to go on: {refused}. Simplify it.")

    def check(self) -> None:
        """Raises TooComplexError once the grammar grew too complex to go on."""
        if self._matcher.is_error():
            self._held.failed = True  # completions share the lexer: those to come would fail at once
            raise TooComplexError("The constraint grew too complex to go on. Simplify it.")

    def accept(self, token: int) -> bool:
        """See `TokenConstraint.accept`."""
        # The matcher's own notion of end-of-sequence is not counted by its other methods, so it never sees one.
        if token in self._eos:
            self._ended = self._ended or self._matcher.is_accepting()
            return self._ended
        if self._ended:
            return False
        taken = self._matcher.try_consume_tokens([token]) == 1
        if not taken:
            self.check()  # a full lexer takes no token either
        return taken

    @property
    def finished(self) -> bool:
        """See `TokenConstraint.finished`."""
        return self._ended or (self._matcher.is_stopped() and self._matcher.is_accepting())

    @staticmethod
    def fill_masks(items: Sequence[tuple[GrammarConstraint, int]], mask_RW: np.ndarray) -> dict[int, Exception]:
        """Fills many rows of one mask at once, in parallel where that is faster.

        Args:
            items: (constraint, row), each constraint once.
            mask_RW: int32 [rows, ceil(vocab / 32)], C-contiguous; other rows stay as they are.
        Returns:
            row -> TooComplexError, for constraints that cannot go on.
        """
        parallel = [(constraint, row) for constraint, row in items if constraint._num_bytes == mask_RW.shape[1] * 4]
        failed: dict[int, Exception] = {}
        if len(parallel) >= PARALLEL_ROWS and mask_RW.flags.c_contiguous:
            began = time.process_time()
            fill_next_token_bitmask_par(_executor(), [(c._matcher, row) for c, row in parallel], mask_RW)
            share = (time.process_time() - began) / len(parallel)
        else:
            parallel, share = [], 0.0
        done = {row for _, row in parallel}
        for constraint, row in items:
            try:
                if row in done:
                    constraint.charge(share)
                    constraint.check()
                else:
                    constraint.fill_mask(mask_RW[row])
            except TooComplexError as error:
                failed[row] = error
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
    """(kind, text) of a constraint, as the compiler takes it.

    Raises:
        RequestError: INVALID_ARGUMENT: it cannot be read or enforced.
    """
    if wanted.json is not None:
        return "JSON schema", json.dumps(prepare(schema_of(wanted.json), PARAM))
    if wanted.json_object:
        return "JSON schema", '{"type": "object"}'
    if wanted.regex is not None:
        check("regex", check_repeats, wanted.regex)
        return "regex", wanted.regex
    if wanted.choice is not None:
        if not wanted.choice or not all(isinstance(text, str) and text for text in wanted.choice):
            raise invalid("choice takes non-empty strings, at least one.", PARAM)
        return "choice", "start: " + " | ".join(lark_string(text) for text in wanted.choice)
    assert wanted.grammar is not None
    if "::=" in wanted.grammar:
        return "grammar", from_gbnf(wanted.grammar)
    check("grammar", check_lark, wanted.grammar)
    return "grammar", wanted.grammar
