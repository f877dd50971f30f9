"""A draft model through the first step of the start: held against the model that it is to guess for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from models.loading.heads import OpenedHead, has_mtp, is_head, open_eagle3, open_mtp
from models.loading.load import Built, build_model
from models.loading.opening import Opened, open_checkpoint
from ops.paged_attention import KVGroups
from serving.boot.draft_source import NAMED, draft_source
from serving.boot.text_side import load_text_side

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from serving.engine.api.config import EngineConfig
    from serving.engine.api.speculative import SpeculativeConfig
    from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Target:
    """The model that a draft is for: its headers, and its shapes."""

    opened: Opened
    built: Built


@dataclasses.dataclass(frozen=True)
class CheckedDraft:
    """A draft's headers, found good.

    Attributes:
        opened: the checkpoint of a draft model, or the head.
        built: the model as shapes; loading fills it. None of a head.
    """

    opened: Opened | OpenedHead
    built: Built | None

    @property
    def model(self) -> Any:
        """The module, as shapes."""
        return self.opened.model if isinstance(self.opened, OpenedHead) else self._built.model

    @property
    def facts(self) -> Any:
        """What decides its programs besides sizes."""
        return self.opened.made if isinstance(self.opened, OpenedHead) else self._built.config

    @property
    def _built(self) -> Built:
        assert self.built is not None, "a draft model is built"
        return self.built


def check_draft(config: EngineConfig, mesh: Mesh, dtype: str, positions: int, target: Target) -> CheckedDraft | None:
    """Reads the headers of the draft that the configuration names; None where it names none.

    Args:
        positions: tokens that a sequence may have.
        target: what it is to guess for.
    Raises:
        ValueError: a draft that cannot guess, in a sentence.
    """
    how = config.speculative_config
    if how is None:
        return None
    if how.looks_up:
        return _head_of_its_own(config, target) if how.method == "auto" else None
    if config.coordinator is not None:
        what = "a head" if how.hears else "a draft model"
        raise ValueError(f"{NAMED} with {what} does not go with coordinator yet; leave one of them out.")
    if how.hears:
        return _check_head(config, how, target)
    source = draft_source(config)
    assert source is not None, "a draft model is named"
    if is_head(source):
        raise ValueError(f'{NAMED}: {how.model} is a head and no model of its own; say "method": "eagle3".')
    opened = open_checkpoint(source)
    if "generate" not in opened.family.tasks:
        raise ValueError(f"{NAMED}: {opened.model_id} is an encoder; a draft must generate.")
    draft = opened.family.config(opened.hf_config)
    if draft.longest_positions < positions:
        raise ValueError(
            f"{NAMED}: the draft {opened.model_id} was made for {draft.longest_positions} positions, sequences here may have "
            f"{positions}. Lower max_model_len to {draft.longest_positions}, or take another draft."
        )
    built = build_model(opened, dtype=dtype, mesh=mesh, max_model_len=positions)
    if built.model.state_specs():
        raise ValueError(
            f"{NAMED}: the draft {opened.model_id} has layers that keep a state; all of a draft's must attend."
        )
    return CheckedDraft(opened, built)


def _head_of_its_own(config: EngineConfig, target: Target) -> CheckedDraft | None:
    """What `auto` takes besides what is looked up: the head in the model's checkpoint, where nothing speaks against it."""
    windows = set(KVGroups.of(target.built.model.kv_specs()).windows)
    several = config.coordinator is not None or (config.num_scheduler_steps or 1) > 1
    if several or not has_mtp(target.opened) or windows != {None}:
        return None
    return CheckedDraft(open_mtp(target.opened, target.built.build), None)


def _check_head(config: EngineConfig, how: SpeculativeConfig, target: Target) -> CheckedDraft:
    if (config.num_scheduler_steps or 1) > 1:
        raise ValueError(
            f"{NAMED} with method {how.method!r} hears every step; set num_scheduler_steps, {config.num_scheduler_steps} here, "
            "to 1."
        )
    if target.opened.family.traced:
        raise ValueError(
            f"{NAMED} with method {how.method!r} hears layers of the model, and {target.opened.model_id} runs transformers' own "
            "code, whose layers nothing hears. Use ngram, suffix or a draft model."
        )
    try:
        if how.method == "mtp":
            return CheckedDraft(open_mtp(target.opened, target.built.build), None)
        source = draft_source(config)
        assert source is not None, "a head of its own is named"
        return CheckedDraft(open_eagle3(source, target.built.config, target.built.build), None)
    except ValueError as error:
        said = str(error)
        raise ValueError(said if said.startswith(NAMED) else f"{NAMED}: {said}") from None


def check_vocabulary(draft: CheckedDraft | None, opened: Opened, vocab_size: int, tokenizer: Tokenizer) -> None:
    """Whether the draft's token ids mean what the model's do. A head's are the model's.

    Args:
        opened, vocab_size, tokenizer: the model's.
    Raises:
        ValueError: they do not, or nobody can tell; naming what differs.
    """
    if draft is None or isinstance(draft.opened, OpenedHead):
        return
    other = load_text_side(draft.opened.source).tokenizer
    who = f"{NAMED}: the draft {draft.opened.model_id}"
    if not (tokenizer.reads_text and other.reads_text):
        its = draft.facts.vocab_size
        if its != vocab_size:
            raise ValueError(f"{who} has a vocabulary of {its} tokens, {opened.model_id} one of {vocab_size}.")
        return
    mine, its = tokenizer.hf.get_vocab(), other.hf.get_vocab()
    if mine == its:
        return
    differing = sorted(token for token in mine.keys() | its.keys() if mine.get(token) != its.get(token))
    token = differing[0]
    raise ValueError(
        f"{who} has another vocabulary than {opened.model_id}: {len(differing)} tokens differ; {token!r} is "
        f"{its.get(token, 'missing')} there and {mine.get(token, 'missing')} here."
    )
