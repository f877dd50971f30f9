"""How large an encoder's batches are when the operator does not say."""

from __future__ import annotations

import dataclasses

from serving.engine.api.config import EngineConfig

LONGEST_BY_ITSELF = 8192
"""Tokens of the longest text of a network with more positions, where nobody says: programs of each length are compiled, and
decoders that classify may have positions for a million."""


@dataclasses.dataclass(frozen=True)
class EncoderSizes:
    """Resolved sizes of an encoder.

    Attributes:
        max_model_len: tokens of the longest text.
        max_num_seqs: texts a batch.
        max_num_batched_tokens: tokens a batch, padding included.
    """

    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int


def encoder_sizes(config: EngineConfig, positions: int, made_for: int | None, platform: str) -> EncoderSizes:
    """
    Args:
        positions: that the network has.
        made_for: tokens that the checkpoint says it was trained on; what longer texts give is anybody's guess.
    Raises:
        ValueError: a text longer than the network's positions is asked for.
    """
    if config.max_model_len is not None and config.max_model_len > positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model has {positions} positions: use at most that."
        )
    longest = config.max_model_len or min(made_for or LONGEST_BY_ITSELF, positions)
    # On CPU a product of 256 rows is as fast a row as larger ones, and whoever comes next waits for the whole batch.
    tokens = config.max_num_batched_tokens or (2048 if platform == "cpu" else 32768)
    return EncoderSizes(longest, config.max_num_seqs or (64 if platform == "cpu" else 256), tokens)
