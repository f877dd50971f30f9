"""EmbeddingGemma (Google 2025, arXiv:2509.20354): Gemma 3's layers, in which every token sees the others of its text both ways."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig
from models.families.bert.bert import attend_texts, run_layer
from models.families.gemma.gemma import GemmaLayer, gemma3_config
from models.family import Family
from models.layers import Build, Embedding, GatedMLP, RMSNorm, child_recipes, heads_of
from models.layers.attention import HeadNormAttention
from models.recipes import Recipes, under
from ops.rope import rope


class BothWaysAttention(HeadNormAttention):
    """`window` is how far a token sees in either direction."""

    def among(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        """What each token of B texts gathers from the others of its text."""
        (B, S, _), (K, G, h) = x_BSD.shape, self.placed
        q_TKGh, k_TKh, v_TKh = heads_of(self.qkv(x_BSD).reshape(B * S, K, G + 2, h))
        q_TKGh, k_TKh = self.normed(q_TKGh, k_TKh)
        if self.rotary is not None:
            positions_T = jnp.tile(jnp.arange(S, dtype=jnp.int32), B)
            q_TKGh, k_TKh = (rope(x, positions_T, *self.rotary) for x in (q_TKGh, k_TKh))
        k_BSHh, v_BSHh = (jnp.repeat(x.reshape(B, S, K, h), G, axis=2) for x in (k_TKh, v_TKh))
        q_BSHh = q_TKGh.reshape(B, S, K * G, h)
        out_BSHh = attend_texts(q_BSHh, k_BSHh, v_BSHh, valid_BS, reach=self.window, scale=self.scale)
        return self.out(out_BSHh.reshape(B, S, K * G * h))


class BothWaysLayer(nnx.Module):
    """x + norm(attn(norm(x))), then x + norm(mlp(norm(x)))."""

    names: ClassVar[dict[str, str]] = GemmaLayer.names

    def __init__(self, config: ModelConfig, index: int, build: Build):
        def norm() -> RMSNorm:
            return RMSNorm(config.embed_dim, config.norm_eps, config.norm_offset)

        self.attn_norm, self.attn_out_norm, self.mlp_norm, self.mlp_out_norm = norm(), norm(), norm(), norm()
        self.attn = BothWaysAttention(config, index, build)
        self.mlp = GatedMLP(config, build)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        x_BSD = x_BSD + self.attn_out_norm(self.attn.among(self.attn_norm(x_BSD), valid_BS))
        y_TD, _ = self.mlp(self.mlp_norm(x_BSD).reshape(-1, x_BSD.shape[-1]), None)
        return x_BSD + self.mlp_out_norm(y_TD.reshape(x_BSD.shape))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class EmbeddingGemma(nnx.Module):
    """`models.api.Encoder`."""

    names: ClassVar[dict[str, str]] = {"embed": "model.embed_tokens", "norm": "model.norm"}

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        self.embed = Embedding(config.vocab_size, config.embed_dim, build)
        self.layers: Any = nnx.List([BothWaysLayer(config, index, build) for index in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, config.norm_eps, config.norm_offset)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """hidden_BSD of B texts of length_B tokens, padded behind their ends (arbitrary there); a pair is read as one text."""
        x_BSD = self.embed(tokens_BS, self.compute_dtype) * self.config.embed_scale
        valid_BS = jnp.arange(tokens_BS.shape[1]) < length_B[:, None]
        for layer in self.layers:
            x_BSD = run_layer(*nnx.split(layer), x_BSD, valid_BS)
        return self.norm(x_BSD)

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"model.layers.{index}"))
        return recipes


def embedding_gemma_config(hf: Mapping[str, Any]) -> ModelConfig:
    if not hf.get("use_bidirectional_attention"):
        raise ValueError(
            "config.json: use_bidirectional_attention is not set; this architecture is supported as an encoder."
        )
    config = gemma3_config({**hf, "use_bidirectional_attention": False})
    # The file counts both directions together.
    return dataclasses.replace(config, windows=tuple(None if w is None else w // 2 for w in config.windows))


FAMILIES = (
    Family(
        "EmbeddingGemma",
        ("Gemma3TextModel",),
        embedding_gemma_config,
        EmbeddingGemma,
        gguf=("gemma-embedding",),
        ignore=(r"^dense_[23]\.weight$",),  # behind pooling: models/loading/opening.py
        tasks=("embed",),
    ),
)
