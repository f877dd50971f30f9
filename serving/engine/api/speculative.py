"""How drafts are made and how many are verified: what vLLM's users give as `--speculative-config`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from typing import Any, cast

from serving.engine.api.settings import RefusedError, shown

METHODS = ("ngram", "suffix", "draft_model", "mtp", "eagle3", "auto")
"""`auto` looks drafts up in everything that `suffix` does, and verifies none where that does not pay."""

ELSEWHERE = ("eagle", "medusa", "mlp_speculator", "dflash", "dspark", "ngram_gpu", "custom_class")
"""Methods of vLLM that there are not here."""

MAX_DRAFT_TOKENS = 32
"""Drafts of a request in one step. Beyond that a step is no longer bound by reading weights, wherever it runs."""

DEFAULT_DRAFT_TOKENS = {"ngram": 4, "suffix": 8, "draft_model": 4, "mtp": 2, "eagle3": 3, "auto": 8}
"""Drafts of a request in one step at most, where the configuration leaves that open."""

LOOKUP = 5
"""Tokens that a lookup goes by where a configuration names neither bound; vLLM's."""

SAME_HERE: dict[str, Any] = {
    "draft_sample_method": "greedy",
    "rejection_sample_method": "standard",
    "disable_padded_drafter_batch": False,
    "parallel_drafting": False,
    "use_heterogeneous_vocab": False,
}
"""Fields of vLLM's of which only one value is served."""


@dataclasses.dataclass(frozen=True)
class SpeculativeConfig:
    """Names and meanings are vLLM's.

    Attributes:
        method: one of METHODS; "draft_model" where only `model` is given.
        model: the draft's checkpoint, for `draft_model`; the head's, for `eagle3`.
        num_speculative_tokens: drafts of a request in one step at most; 0 for the method's default.
        prompt_lookup_max, prompt_lookup_min: for `ngram`, how many of a request's last tokens must have stood before.
        suffix_decoding_max_tree_depth: for `suffix`, so many of the last tokens are compared at most.
        suffix_decoding_max_cached_requests: recent completions that are looked in, of all tenants together; 0 for none.
        suffix_decoding_max_spec_factor: drafts at most for each token that matched.
        suffix_decoding_min_token_prob: drafts end where the next one is less likely, by what was counted.
        enable_adaptive_verification: verify no more drafts in a step than pay; False verifies whatever is proposed.
    """

    method: str
    model: str | None = None
    num_speculative_tokens: int = 0
    prompt_lookup_max: int = LOOKUP
    prompt_lookup_min: int = LOOKUP
    suffix_decoding_max_tree_depth: int = 24
    suffix_decoding_max_cached_requests: int = 10_000
    suffix_decoding_max_spec_factor: float = 1.0
    suffix_decoding_min_token_prob: float = 0.1
    enable_adaptive_verification: bool = True

    @property
    def draft_tokens(self) -> int:
        """Drafts of a request in one step at most."""
        return self.num_speculative_tokens or DEFAULT_DRAFT_TOKENS[self.method]

    @property
    def looks_up(self) -> bool:
        """Whether drafts come from what was written before."""
        return self.method in ("ngram", "suffix", "auto")

    @property
    def hears(self) -> bool:
        """Whether they come from a head that hears the model."""
        return self.method in ("mtp", "eagle3")

    @property
    def looks_at_others(self) -> bool:
        """Whether they come from other requests' completions too."""
        return self.method in ("suffix", "auto") and self.suffix_decoding_max_cached_requests > 0

    @classmethod
    def read(cls, value: Any) -> SpeculativeConfig:
        """From a mapping, its JSON, or one of these.

        Raises:
            RefusedError: what is wrong with it, in a sentence.
        """
        if isinstance(value, SpeculativeConfig):
            return value
        given = _mapping(value)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names and name not in SAME_HERE:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]}" if near else ""
                raise RefusedError(f"there is no field {name!r}{hint}. Its fields are {', '.join(names)}.")
        given = {name: value for name, value in given.items() if value is not None}  # null is as good as left out
        for name, only in SAME_HERE.items():
            if given.get(name, only) != only:
                raise RefusedError(f"{name} can only be {only!r} here; got {shown(given[name])}.")
        return cls._checked({name: value for name, value in given.items() if name in names})

    @classmethod
    def _checked(cls, given: dict[str, Any]) -> SpeculativeConfig:
        if "model" in given:
            given["model"] = _name(given["model"])
        method = given.get("method", "draft_model" if "model" in given else None)
        if isinstance(method, str) and method.endswith("_mtp"):
            method = "mtp"  # vLLM's older names, one a family: deepseek_mtp, qwen3_next_mtp, ...
        if method in ELSEWHERE:
            raise RefusedError(f"method {method!r} is not served here yet; there are {', '.join(METHODS)}.")
        if method not in METHODS:
            raise RefusedError(f"method must be one of {', '.join(METHODS)}; got {shown(method)}.")
        given["method"] = method
        needed = {"draft_model": "the draft's checkpoint", "eagle3": "the head's checkpoint"}.get(method)
        if (needed is not None) != ("model" in given):
            what = "takes no model" if needed is None else f"needs a model: {needed}"
            raise RefusedError(f"method {method!r} {what}.")
        _whole(given, "num_speculative_tokens", 1, MAX_DRAFT_TOKENS)
        _whole(given, "prompt_lookup_max", 1, 64)
        _whole(given, "prompt_lookup_min", 1, 64)
        _whole(given, "suffix_decoding_max_tree_depth", 1, 256)
        _whole(given, "suffix_decoding_max_cached_requests", 0, 1_000_000)
        _number(given, "suffix_decoding_max_spec_factor", 0.0, 64.0)
        _number(given, "suffix_decoding_min_token_prob", 0.0, 1.0)
        if not isinstance(given.get("enable_adaptive_verification", True), bool):
            raise RefusedError(
                f"enable_adaptive_verification must be true or false; got {shown(given['enable_adaptive_verification'])}."
            )
        # As vLLM: one bound alone is both.
        if "prompt_lookup_max" in given:
            given.setdefault("prompt_lookup_min", given["prompt_lookup_max"])
        elif "prompt_lookup_min" in given:
            given["prompt_lookup_max"] = given["prompt_lookup_min"]
        found = cls(**given)
        if found.prompt_lookup_min > found.prompt_lookup_max:
            raise RefusedError(
                f"prompt_lookup_min is {found.prompt_lookup_min}, more than prompt_lookup_max, {found.prompt_lookup_max}."
            )
        return found


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RefusedError(f"it is no JSON: {error}.") from None
        except RecursionError:
            raise RefusedError("it is nested too deeply.") from None
    if not isinstance(value, Mapping):
        raise RefusedError(f'it must be an object such as {{"method": "ngram"}}; got {shown(value)}.')
    return {str(name): item for name, item in cast(Mapping[Any, Any], value).items()}


def _name(value: Any) -> str:
    """A checkpoint's, as `--model` takes it."""
    if not isinstance(value, str | os.PathLike) or not str(value).strip():  # pyright: ignore[reportUnknownArgumentType]
        raise RefusedError(f"model must be a file, a folder or a hub id; got {shown(value)}.")
    return str(value)  # pyright: ignore[reportUnknownArgumentType] - what a path is a path of is open


def _whole(given: Mapping[str, Any], name: str, least: int, most: int) -> None:
    value = given.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(f"{name} must be a whole number from {least} to {most}; got {shown(value)}.")


def _number(given: Mapping[str, Any], name: str, least: float, most: float) -> None:
    value = given.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise RefusedError(f"{name} must be a number from {least:g} to {most:g}; got {shown(value)}.")
