"""BERT-like encoders (Devlin et al. 2018, arXiv:1810.04805): MiniLM, BGE, E5 and other models that turn texts into vectors.

Not a `CausalLM`: every token attends to every other of its text, nothing is kept, and there are no logits. `encode` gives
hidden states, `pool` (models.pooling) one vector a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig, from_hf
from models.family import Family
from models.layers import Build, Embedding, LayerNorm, Linear, child_recipes, weight
from models.loading import names
from models.loading.names import Recipe, Recipes, one
from ops.activation import activation
from ops.linear import embed

_MASKED = -1e30


class SelfAttention(nnx.Module):
    """Bidirectional attention within each text; q, k and v are one projection, laid out [H, 3, h]."""

    def __init__(self, config: ModelConfig, build: Build):
        H, h, D = config.num_heads, config.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.heads = (H, h)
        self.qkv = Linear(D, H * 3 * h, build, (axis, "embed"), bias=True)
        self.out = Linear(H * h, D, build, ("embed", axis), bias=True)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        (B, S, _), (H, h) = x_BSD.shape, self.heads
        q_BSHh, k_BSHh, v_BSHh = jnp.moveaxis(self.qkv(x_BSD).reshape(B, S, H, 3, h), 3, 0)
        scores = jnp.einsum("bqhd,bshd->bhqs", q_BSHh, k_BSHh, preferred_element_type=jnp.float32) * h**-0.5
        weights = jax.nn.softmax(jnp.where(valid_BS[:, None, None], scores, _MASKED), axis=-1)
        out_BSHh = jnp.einsum("bhqs,bshd->bqhd", weights.astype(v_BSHh.dtype), v_BSHh)
        return self.out(out_BSHh.reshape(B, S, H * h))

    def recipes(self, name: str) -> Recipes:
        H, h = self.heads
        sources = [f"{name}.self.{part}" for part in ("query", "key", "value")]
        D = self.qkv.weight.shape[1]
        fuse = names.interleave_heads(H, 1)
        weights = names.pieces([f"{source}.weight" for source in sources], *((H * h, D),) * 3)
        biases = names.pieces([f"{source}.bias" for source in sources], *((H * h,),) * 3)
        recipes = {"qkv.weight": Recipe(weights, fuse), "qkv.bias": Recipe(biases, fuse)}
        return recipes | names.under("out", self.out.recipes(f"{name}.output.dense"))


class EncoderLayer(nnx.Module):
    """norm(x + attn(x)), then norm(x + mlp(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn": "attention",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }

    def __init__(self, config: ModelConfig, build: Build):
        D, F = config.embed_dim, config.ffw_dim
        axis = build.axis("ffw", F)
        self.activation = config.activation
        self.attn = SelfAttention(config, build)
        self.attn_norm = LayerNorm(D, config.norm_eps)
        self.up = Linear(D, F, build, (axis, "embed"), bias=True)
        self.down = Linear(F, D, build, ("embed", axis), bias=True)
        self.mlp_norm = LayerNorm(D, config.norm_eps)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        x_BSD = self.attn_norm(x_BSD + self.attn(x_BSD, valid_BS))
        return self.mlp_norm(x_BSD + self.down(activation(self.activation)(self.up(x_BSD))))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class Bert(nnx.Module):
    """`models.api.Encoder`: token, position and segment embeddings, then layers that see the whole text."""

    names: ClassVar[dict[str, str]] = {"embed": "embeddings.word_embeddings", "norm": "embeddings.LayerNorm"}

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D = config.embed_dim
        self.embed = Embedding(config.vocab_size, D, build)
        self.positions = weight((config.max_positions, D), build.dtype, (None, "embed"))
        self.segments = weight((config.get("segments"), D), build.dtype, (None, "embed"))
        self.norm = LayerNorm(D, config.norm_eps)
        self.layers: Any = nnx.List([EncoderLayer(config, build) for _ in range(config.num_layers)])

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """Hidden states of B texts, each padded behind its end.

        Args:
            tokens_BS: int32 ids.
            length_B: int32 tokens of each text, 0 for a padded row.
            segments_BS: int32 which of a pair of texts a token is of; None for the first.
        Returns:
            hidden_BSD in the compute dtype; arbitrary beyond a text's end.
        """
        S = tokens_BS.shape[1]
        dtype = self.compute_dtype
        x_BSD = self.embed(tokens_BS, dtype) + embed(self.positions[...], jnp.arange(S, dtype=jnp.int32), dtype)
        segments_BS = jnp.zeros_like(tokens_BS) if segments_BS is None else segments_BS
        x_BSD = self.norm(x_BSD + embed(self.segments[...], segments_BS, dtype))
        valid_BS = jnp.arange(S) < length_B[:, None]
        for layer in self.layers:
            x_BSD = layer(x_BSD, valid_BS)
        return x_BSD

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        recipes["positions"] = one("embeddings.position_embeddings.weight", *self.positions.shape)
        recipes["segments"] = one("embeddings.token_type_embeddings.weight", *self.segments.shape)
        for index, layer in enumerate(self.layers):
            recipes |= names.under(f"layers.{index}", layer.recipes(f"encoder.layer.{index}"))
        return recipes


def bert_config(hf: Mapping[str, Any]) -> ModelConfig:
    kind = hf.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"config.json: position_embedding_type {kind!r} is not supported; supported: 'absolute'.")
    return from_hf(
        hf,
        rope=None,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=hf.get("hidden_act", "gelu"),
        tie_embeddings=True,
        extra=(("segments", hf.get("type_vocab_size", 2)),),
    )


FAMILIES = (
    Family(
        "BERT encoders (MiniLM, BGE, E5)",
        ("BertModel",),
        bert_config,
        Bert,
        ignore=(r"^(bert\.)?pooler\.", r"position_ids$", r"^cls\."),
    ),
)
