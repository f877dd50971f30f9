"""Nomic's BERT (Nussbaum et al. 2024, arXiv:2402.01613): BERT's post-norm blocks with rotary positions, gated feed-forward blocks
and no biases; nomic-embed-text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig, from_hf, rope_from_hf
from models.families.bert.bert import run_layer
from models.families.bert.modernbert import ModernBertAttention
from models.family import Family
from models.layers import Build, Embedding, GatedMLP, LayerNorm, child_recipes
from models.layers.build import weight
from models.recipes import Recipes, deal, one, pieces, under
from ops.linear import embed


class NomicAttention(ModernBertAttention):
    def recipes(self, name: str) -> Recipes:
        return super().recipes(name) | under("out", self.out.recipes(f"{name}.out_proj"))


class NomicMLP(GatedMLP):
    """The gate is `fc12`, what it opens for `fc11`."""

    def recipes(self, name: str) -> Recipes:
        D, F = self.down.weight.shape
        both = pieces([f"{name}.fc12.weight", f"{name}.fc11.weight"], (F, D), (F, D))
        return {"gate_up.weight": deal(self.shards, *both)} | under("down", self.down.recipes(f"{name}.fc2"))


class NomicLayer(nnx.Module):
    """norm(x + attn(x)), then norm(x + mlp(x))."""

    names: ClassVar[dict[str, str]] = {"attn": "attn", "attn_norm": "norm1", "mlp": "mlp", "mlp_norm": "norm2"}

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.attn = NomicAttention(config, index, build)
        self.attn_norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.mlp = NomicMLP(config, build)
        self.mlp_norm = LayerNorm(config.embed_dim, config.norm_eps)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        x_BSD = self.attn_norm(x_BSD + self.attn(x_BSD, valid_BS))
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        return self.mlp_norm(x_TD + self.mlp(x_TD, None)[0]).reshape(x_BSD.shape)

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class NomicBert(nnx.Module):
    """`models.api.Encoder`: token and segment embeddings, then layers that see the whole text."""

    names: ClassVar[dict[str, str]] = {"embed": "embeddings.word_embeddings", "norm": "emb_ln"}

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        self.embed = Embedding(config.vocab_size, config.embed_dim, build)
        self.segments = weight((config.get("segments"), config.embed_dim), build.dtype, (None, "embed"))
        self.norm = LayerNorm(config.embed_dim, config.norm_eps)
        self.layers: Any = nnx.List([NomicLayer(config, index, build) for index in range(config.num_layers)])

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """As `models.api.Encoder`."""
        segments_BS = jnp.zeros_like(tokens_BS) if segments_BS is None else segments_BS
        segments_BS = jnp.minimum(segments_BS, self.segments.shape[0] - 1)
        x_BSD = self.embed(tokens_BS, self.compute_dtype) + embed(self.segments[...], segments_BS, self.compute_dtype)
        x_BSD = self.norm(x_BSD)
        valid_BS = jnp.arange(tokens_BS.shape[1]) < length_B[:, None]
        for layer in self.layers:
            x_BSD = run_layer(*nnx.split(layer), x_BSD, valid_BS)
        return x_BSD

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        recipes["segments"] = one("embeddings.token_type_embeddings.weight", *self.segments.shape)
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"encoder.layers.{index}"))
        return recipes


def nomic_bert_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The authors' files have GPT-2's names for sizes, transformers' its own."""
    for name in ("qkv_proj_bias", "mlp_fc1_bias", "mlp_fc2_bias", "prenorm", "parallel_block", "moe_every_n_layers"):
        if hf.get(name):
            raise ValueError(f"config.json: {name} {hf[name]!r} is not supported; published text encoders have none.")
    renamed = {
        "hidden_size": hf.get("n_embd"),
        "num_hidden_layers": hf.get("n_layer"),
        "num_attention_heads": hf.get("n_head"),
        "intermediate_size": hf.get("n_inner"),
        "max_position_embeddings": hf.get("n_positions"),
        "rope_theta": hf.get("rotary_emb_base"),
    }
    hf = {**hf, **{name: value for name, value in renamed.items() if value is not None}}
    activation = hf.get("activation_function", "swiglu")
    if activation != "swiglu":
        raise ValueError(f"config.json: activation_function {activation!r} is not supported; supported: 'swiglu'.")
    dim = hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"]
    return from_hf(
        hf,
        rope=rope_from_hf(hf, dim),
        norm_eps=hf.get("layer_norm_epsilon") or hf.get("layer_norm_eps", 1e-12),
        activation=hf.get("hidden_act", "silu"),
        tie_embeddings=True,
        extra=(("segments", hf.get("type_vocab_size", 2)),),
    )


FAMILIES = (
    Family(
        "Nomic BERT encoders (nomic-embed-text)",
        ("NomicBertModel",),
        nomic_bert_config,
        NomicBert,
        gguf=("nomic-bert",),
        ignore=(r"^pooler\.", r"^cls\."),
        tasks=("embed",),
    ),
)
