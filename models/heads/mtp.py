"""Multi-token prediction (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2): one more block of the model's own kind.

It reads the embedding of a token beside the model's hidden states before it, each through a norm, joined by one projection; the
table and the output projection are the model's. A checkpoint may have trained several in a row; the first one is used, behind
its own results where it guesses further.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import KVCache, Step
from models.config import ModelConfig
from models.heads.head import Said
from models.kept import Cache, Kept
from models.layers import Build, Linear, RMSNorm, child_recipes
from models.recipes import Recipes, under
from ops.paged_attention.batch import KVSpec


@dataclasses.dataclass(frozen=True)
class Names:
    """What a checkpoint calls the parts.

    Attributes:
        embed_norm, hidden_norm, join, norm: before the projection, it, and before the output projection.
        layer: the block.
        head: a copy of the output projection, where checkpoints have one; taken where it is no copy.
        normed_again: what stands for the model's hidden states is taken behind `norm`, not before it.
    """

    embed_norm: str
    hidden_norm: str
    join: str
    norm: str
    layer: str
    head: str | None = None
    normed_again: bool = False


def behind(layers: int) -> Names:
    """DeepSeek-V3's and GLM's: the layer behind the last one of a model with so many."""
    name = f"model.layers.{layers}"
    return Names(
        f"{name}.enorm",
        f"{name}.hnorm",
        f"{name}.eh_proj",
        f"{name}.shared_head.norm",
        name,
        f"{name}.shared_head.head",
    )


BESIDE = Names(
    "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm", "mtp.layers.0", normed_again=True
)
"""Qwen3-Next's and Qwen3.5's: beside the model."""


@dataclasses.dataclass(frozen=True)
class MTP:
    """How a family's head is made.

    Attributes:
        config: the model's with one more layer, the head's.
        layer: as `models.decoder.Decoder` takes it.
        names: where a checkpoint has it.
    """

    config: ModelConfig
    layer: Callable[[ModelConfig, int, Build], Any]
    names: Names


class MTPHead(nnx.Module):
    """`models.heads.Head`.

    Args:
        own_head: the checkpoint's output projection of the head is not the model's.
    """

    taps: ClassVar[tuple[int, ...]] = ()

    def __init__(self, made: MTP, build: Build, own_head: bool = False):
        config = made.config
        D = config.embed_dim
        self.config, self.names, self.compute_dtype = config, made.names, build.compute_dtype
        self.own_head = own_head
        self.embed_norm, self.hidden_norm, self.norm = (
            RMSNorm(D, config.norm_eps, config.norm_offset) for _ in range(3)
        )
        self.join = Linear(2 * D, D, build, (None, "embed"))
        self.layers: Any = nnx.List([made.layer(config, config.num_layers - 1, build)])
        self.kept = Kept.of(self.layers)
        if own_head:
            self.head = Linear(D, config.vocab_size, build, (build.axis("vocab", config.vocab_size), "embed"))

    @property
    def heard_dim(self) -> int:
        return self.config.embed_dim

    def share(self, model: Any) -> None:
        self.embed = model.embed
        if not self.own_head:
            self.head = model.head

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.kept.specs

    def hear(self, heard_TH: jax.Array) -> jax.Array:
        return heard_TH

    def forward(self, step: Step, cache: KVCache, hidden_TD: jax.Array) -> Said:
        embed_TD = self.embed_norm(self.embed(step.tokens_T, self.compute_dtype))
        x_TD = self.join(jnp.concatenate([embed_TD, self.hidden_norm(hidden_TD).astype(embed_TD.dtype)], axis=-1))
        steps, parts = step.by_group(), Cache(self.kept, step.attention, cache)
        group, kept = parts.of(0)
        x_TD, kept, *_ = self.layers[0](x_TD, steps[group], kept)
        parts.put(0, kept)
        normed_TD = self.norm(x_TD)
        return Said(normed_TD, normed_TD if self.names.normed_again else x_TD, parts.whole())

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        if self.head is None:
            return self.embed.logits(hidden_RD)
        return self.head(hidden_RD, out_dtype=jnp.float32)

    def recipes(self) -> Recipes:
        names = self.names
        children = {part: getattr(names, part) for part in ("embed_norm", "hidden_norm", "join", "norm")}
        if self.own_head:
            assert names.head is not None
            children["head"] = names.head
        return child_recipes(self, children, "") | under("layers.0", self.layers[0].recipes(names.layer))
