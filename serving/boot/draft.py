"""A draft model through the first step of the start: held against the model that it is to guess for."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from models.api import CausalLM
from models.loading.load import Built, build_model
from models.loading.opening import Opened, open_checkpoint
from models.loading.source import resolve
from serving.boot.text_side import load_text_side

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from serving.engine.api.config import EngineConfig
    from serving.text.tokenizer import Tokenizer

NAMED = "speculative_config"


@dataclasses.dataclass(frozen=True)
class CheckedDraft:
    """A draft's headers, found good.

    Attributes:
        opened: the checkpoint.
        built: the model as shapes; loading fills it.
    """

    opened: Opened
    built: Built

    @property
    def model(self) -> CausalLM:
        """The module."""
        return self.built.model


def check_draft(config: EngineConfig, mesh: Mesh, dtype: str, positions: int) -> CheckedDraft | None:
    """Reads the headers of the draft that the configuration names; None where it names none.

    Args:
        positions: tokens that a sequence may have.
    Raises:
        ValueError: a draft that cannot guess, in a sentence.
    """
    how = config.speculative_config
    if how is None or how.model is None:
        return None
    for name in ("coordinator", "compiled"):
        if getattr(config, name) is not None:
            raise ValueError(f"{NAMED} with a draft model does not go with {name} yet; leave one of them out.")
    opened = open_checkpoint(resolve(how.model, progress=config.progress))
    if "generate" not in opened.family.tasks:
        raise ValueError(f"{NAMED}: {opened.model_id} is an encoder; a draft must generate.")
    draft = opened.family.config(opened.hf_config)
    if draft.longest_positions < positions:
        raise ValueError(
            f"{NAMED}: the draft {opened.model_id} was made for {draft.longest_positions} positions, sequences here may have "
            f"{positions}. Lower max_model_len to {draft.longest_positions}, or take another draft."
        )
    return CheckedDraft(opened, build_model(opened, dtype=dtype, mesh=mesh, max_model_len=positions))


def check_vocabulary(draft: CheckedDraft | None, opened: Opened, vocab_size: int, tokenizer: Tokenizer) -> None:
    """Whether the draft's token ids mean what the model's do.

    Args:
        opened, vocab_size, tokenizer: the model's.
    Raises:
        ValueError: they do not, or nobody can tell; naming what differs.
    """
    if draft is None:
        return
    other = load_text_side(draft.opened.source).tokenizer
    who = f"{NAMED}: the draft {draft.opened.model_id}"
    if not (tokenizer.reads_text and other.reads_text):
        its = draft.built.config.vocab_size
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
