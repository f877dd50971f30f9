"""From hidden states to one vector a text, as sentence-transformers describes it in `1_Pooling/config.json`."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp

MODES = ("mean", "cls", "last")


def pool(hidden_BSD: jax.Array, length_B: jax.Array, mode: str, normalize: bool = True) -> jax.Array:
    """One float32 vector a text.

    Args:
        hidden_BSD: hidden states, padded behind each text's end.
        length_B: tokens of each text; 0 for a padded row, whose vector is zero.
        mode: "mean" of all tokens, the first token ("cls") or the "last" one.
        normalize: to length 1.
    Raises:
        ValueError: an unknown mode.
    """
    hidden_BSD = hidden_BSD.astype(jnp.float32)
    valid_BS = jnp.arange(hidden_BSD.shape[1]) < length_B[:, None]
    if mode == "mean":
        kept = jnp.where(valid_BS[..., None], hidden_BSD, 0.0)
        pooled_BD = kept.sum(1) / jnp.maximum(length_B, 1)[:, None]
    elif mode == "cls":
        pooled_BD = hidden_BSD[:, 0]
    elif mode == "last":
        pooled_BD = jnp.take_along_axis(hidden_BSD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]
    else:
        raise ValueError(f"the pooling mode {mode!r} is not supported; supported: {list(MODES)}.")
    pooled_BD = jnp.where((length_B > 0)[:, None], pooled_BD, 0.0)
    if normalize:
        norm_B1 = jnp.linalg.norm(pooled_BD, axis=-1, keepdims=True)
        pooled_BD = pooled_BD / jnp.maximum(norm_B1, 1e-12)
    return pooled_BD


def pooling_mode(directory: Path, default: str = "mean") -> str:
    """The mode that a sentence-transformers directory asks for; `default` where it does not say.

    Raises:
        ValueError: a mode, or a step behind pooling (modules.json), that is not supported.
    """
    modules = directory / "modules.json"
    if modules.exists():
        kinds = [entry.get("type", "").rpartition(".")[2] for entry in json.loads(modules.read_text())]
        unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
        if unknown:
            raise ValueError(
                f"{modules} has the step {unknown[0]!r}, which is not supported; supported: Transformer, Pooling, Normalize."
            )
    path = directory / "1_Pooling" / "config.json"
    if not path.exists():
        return default
    config = json.loads(path.read_text())
    asked = [name.removeprefix("pooling_mode_") for name, value in config.items() if value is True and "_mode_" in name]
    # A mean over sqrt(length) differs from the mean by a factor, and vectors are scaled to length 1.
    names = {"cls_token": "cls", "lasttoken": "last", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean"}
    if not asked:
        return default
    if len(asked) > 1 or asked[0] not in names:
        raise ValueError(f"{path} asks for the pooling {' and '.join(asked)}; supported: {', '.join(names)}.")
    return names[asked[0]]


def max_sequence(directory: Path) -> int | None:
    """The longest text, in tokens, that a sentence-transformers directory was made for; None where it does not say."""
    path = directory / "sentence_bert_config.json"
    return json.loads(path.read_text()).get("max_seq_length") if path.exists() else None
