"""MPNet encoders (Song et al. 2020, arXiv:2004.09297): BERT with a bias by distance on every layer's scores, the same in all."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.families.bert.bert import EncoderLayer, SelfAttention, bert_config, run_layer
from models.family import Family
from models.layers import Build, Embedding, LayerNorm, child_recipes, weight
from models.recipes import Recipes, one, under
from ops.linear import embed

FIRST_POSITION = 2  # of the table; the rows before it are for padding, whose id is 1 in every checkpoint
FARTHEST = 128  # distances beyond share a bucket


class MPNetAttention(SelfAttention):
    names: ClassVar[tuple[str, ...]] = ("attn.q", "attn.k", "attn.v", "attn.o")


class MPNetLayer(EncoderLayer):
    names: ClassVar[dict[str, str]] = EncoderLayer.names | {"attn_norm": "attention.LayerNorm"}
    attention: ClassVar[type[SelfAttention]] = MPNetAttention


class MPNet(nnx.Module):
    """`models.api.Encoder`."""

    names: ClassVar[dict[str, str]] = {"embed": "embeddings.word_embeddings", "norm": "embeddings.LayerNorm"}

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D = config.embed_dim
        self.embed = Embedding(config.vocab_size, D, build)
        self.positions = weight((FIRST_POSITION + config.max_positions, D), build.dtype, (None, "embed"))
        self.norm = LayerNorm(D, config.norm_eps)
        self.bias = weight((config.get("buckets"), config.num_heads), jnp.float32, (None, None))
        self.layers: Any = nnx.List([MPNetLayer(config, build) for _ in range(config.num_layers)])

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """hidden_BSD of B texts of length_B tokens, padded behind their ends (arbitrary there); a pair is read as one text."""
        S, dtype = tokens_BS.shape[1], self.compute_dtype
        positions = jnp.arange(S, dtype=jnp.int32) + FIRST_POSITION
        x_BSD = self.norm(self.embed(tokens_BS, dtype) + embed(self.positions[...], positions, dtype))
        valid_BS = jnp.arange(S) < length_B[:, None]
        # Of each head, for every distance from S - 1 places before a token to S - 1 behind it.
        bias_HR = self.bias[...][buckets(S, self.bias.shape[0])].T
        for layer in self.layers:
            x_BSD = run_layer(*nnx.split(layer), x_BSD, valid_BS, bias_HR)
        return x_BSD

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        recipes["positions"] = one("embeddings.position_embeddings.weight", *self.positions.shape)
        recipes["bias"] = one("encoder.relative_attention_bias.weight", *self.bias.shape)
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"encoder.layer.{index}"))
        return recipes


def buckets(length: int, count: int) -> np.ndarray:
    """int32 [2 length - 1]: the bucket of each distance (key less query) from -(length - 1) on; T5's rule (arXiv:1910.10683)."""
    distance = np.arange(1 - length, length)
    half = count // 2
    exact, far = half // 2, np.abs(distance)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / exact) / np.float32(math.log(FARTHEST / exact))
    coarse = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    return (np.where(distance > 0, half, 0) + np.where(far < exact, far, coarse)).astype(np.int32)


def mpnet_config(hf: Mapping[str, Any]) -> ModelConfig:
    config = bert_config({**hf, "type_vocab_size": 1}, FIRST_POSITION)
    extra = (*config.extra, ("buckets", hf.get("relative_attention_num_buckets", 32)))
    return dataclasses.replace(config, extra=extra)


FAMILIES = (
    Family(
        "MPNet encoders (all-mpnet)",
        ("MPNetModel", "MPNetForMaskedLM"),
        mpnet_config,
        MPNet,
        ignore=(r"^(mpnet\.)?pooler\.", r"position_ids$", r"^lm_head\."),
        tasks=("embed",),
    ),
)
