"""ModernBERT (Warner et al. 2024, arXiv:2412.13663): an encoder with rotary positions, gated feed-forward blocks and windows on
two layers of three; embedding models (GTE, Nomic) and rerankers made of it, and classifiers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig, from_hf, rope_from_hf, windows_from_hf
from models.families.bert.bert import attend_texts, run_layer
from models.family import Family
from models.label_head import with_labels
from models.layers import Build, Embedding, GatedMLP, LayerNorm, Linear, child_recipes, layer_frequencies
from models.recipes import Piece, Recipe, Recipes, deal, split, under
from ops.activation import activation
from ops.rope import rope


class ModernBertAttention(nnx.Module):
    """Bidirectional attention within each text; q, k and v are one projection, laid out [H, 3, h]."""

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        H, h, D = config.num_heads, config.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.heads, self.reach = (H, h), config.windows[layer]
        rotary = config.layer_rope(layer)
        assert rotary is not None
        self.rope = (rotary, build.max_model_len)
        self.qkv = Linear(D, H * 3 * h, build, (axis, "embed"), bias=config.qkv_bias)
        self.out = Linear(H * h, D, build, ("embed", axis), bias=config.out_bias)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        (B, S, _), (H, h) = x_BSD.shape, self.heads
        q_BSHh, k_BSHh, v_BSHh = jnp.moveaxis(self.qkv(x_BSD).reshape(B, S, H, 3, h), 3, 0)
        inv_freq, scale = layer_frequencies(*self.rope)

        def rotate(x_BSHh: jax.Array) -> jax.Array:
            return jnp.moveaxis(rope(jnp.moveaxis(x_BSHh, 1, 0), jnp.arange(S), inv_freq, scale), 0, 1)

        out_BSHh = attend_texts(rotate(q_BSHh), rotate(k_BSHh), v_BSHh, valid_BS, self.reach)
        return self.out(out_BSHh.reshape(B, S, H * h))

    def recipes(self, name: str) -> Recipes:
        H, h = self.heads

        def by_head(piece: Piece) -> Recipe:
            return deal(H, *split(piece, H * h, H * h, H * h))

        recipes: Recipes = {"qkv.weight": by_head(Piece(f"{name}.Wqkv.weight", self.qkv.weight.shape))}
        if self.qkv.bias is not None:
            recipes["qkv.bias"] = by_head(Piece(f"{name}.Wqkv.bias", self.qkv.bias.shape))
        return recipes | under("out", self.out.recipes(f"{name}.Wo"))


class ModernBertMLP(GatedMLP):
    """Feed-forward whose checkpoint has gate and up in one tensor."""

    def recipes(self, name: str) -> Recipes:
        F = self.down.weight.shape[1]

        def halves(piece: Piece) -> Recipe:
            return deal(self.shards, *split(piece, F, F))

        recipes: Recipes = {"gate_up.weight": halves(Piece(f"{name}.Wi.weight", self.gate_up.weight.shape))}
        if self.gate_up.bias is not None:
            recipes["gate_up.bias"] = halves(Piece(f"{name}.Wi.bias", self.gate_up.bias.shape))
        return recipes | under("down", self.down.recipes(f"{name}.Wo"))


class ModernBertLayer(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); the first layer's input is normed already."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        D, bias = config.embed_dim, config.get("norm_bias")
        self.attn_norm = LayerNorm(D, config.norm_eps, bias) if index else None
        self.attn = ModernBertAttention(config, index, build)
        self.mlp_norm = LayerNorm(D, config.norm_eps, bias)
        self.mlp = ModernBertMLP(config, build)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array) -> jax.Array:
        normed_BSD = x_BSD if self.attn_norm is None else self.attn_norm(x_BSD)
        x_BSD = x_BSD + self.attn(normed_BSD, valid_BS)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        return (x_TD + self.mlp(self.mlp_norm(x_TD), None)[0]).reshape(x_BSD.shape)

    def recipes(self, name: str) -> Recipes:
        children = ["attn", "mlp_norm", "mlp"] + ([] if self.attn_norm is None else ["attn_norm"])
        return child_recipes(self, {child: child for child in children}, name)


class ModernBert(nnx.Module):
    """`models.api.Encoder`: token embeddings, layers that see the whole text or what is near, a final norm."""

    names: ClassVar[dict[str, str]] = {
        "embed": "model.embeddings.tok_embeddings",
        "embed_norm": "model.embeddings.norm",
        "norm": "model.final_norm",
    }

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D, bias = config.embed_dim, config.get("norm_bias")
        self.embed = Embedding(config.vocab_size, D, build)
        self.embed_norm = LayerNorm(D, config.norm_eps, bias)
        self.layers: Any = nnx.List([ModernBertLayer(config, index, build) for index in range(config.num_layers)])
        self.norm = LayerNorm(D, config.norm_eps, bias)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """As `models.api.Encoder`; which of two texts a token is of makes no difference to this network."""
        x_BSD = self.embed_norm(self.embed(tokens_BS, self.compute_dtype))
        valid_BS = jnp.arange(tokens_BS.shape[1]) < length_B[:, None]
        for layer in self.layers:
            x_BSD = run_layer(*nnx.split(layer), x_BSD, valid_BS)
        return self.norm(x_BSD)

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"model.layers.{index}"))
        return recipes


class ModernBertClassifier(ModernBert):
    """`models.api.Classifier`: the first token's state or the mean through a dense layer, a norm and a row of weights a label."""

    names: ClassVar[dict[str, str]] = ModernBert.names | {
        "dense": "head.dense",
        "head_norm": "head.norm",
        "head": "classifier",
    }

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        D = config.embed_dim
        self.dense = Linear(D, D, build, (None, "embed"), bias=config.get("classifier_bias"))
        self.head_norm = LayerNorm(D, config.norm_eps, config.get("norm_bias"))
        self.head = Linear(D, len(config.get("labels")), build, (None, "embed"), bias=True)

    def classify(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """logit_BL float32 from what `encode` gave."""
        state_BD = hidden_BSD[:, 0]
        if self.config.get("classifier_pooling") == "mean":
            valid_BS = jnp.arange(hidden_BSD.shape[1]) < length_B[:, None]
            total_BD = jnp.where(valid_BS[..., None], hidden_BSD, 0.0).sum(1)
            state_BD = total_BD / jnp.maximum(length_B, 1)[:, None]
        state_BD = self.head_norm(activation(self.config.get("classifier_activation"))(self.dense(state_BD)))
        return self.head(state_BD, out_dtype=jnp.float32)


def modernbert_config(hf: Mapping[str, Any]) -> ModelConfig:
    """A window of n attends to n / 2 tokens on either side; its layers rotate from another base."""
    layers, every = hf["num_hidden_layers"], hf.get("global_attn_every_n_layers", 3)
    kinds = hf.get("layer_types") or [
        "sliding_attention" if index % every else "full_attention" for index in range(layers)
    ]
    reach = hf.get("local_attention", 128) // 2
    dim = hf["hidden_size"] // hf["num_attention_heads"]
    bias, pooling = bool(hf.get("attention_bias", False)), hf.get("classifier_pooling", "cls")
    if pooling not in ("cls", "mean"):
        raise ValueError(f"config.json: classifier_pooling {pooling!r} is not supported; supported: 'cls', 'mean'.")
    return from_hf(
        hf,
        rope=rope_from_hf(
            hf, dim, "full_attention", None if hf.get("rope_parameters") else _base(hf, "global", 160000.0)
        ),
        local_rope=rope_from_hf(
            hf, dim, "sliding_attention", None if hf.get("rope_parameters") else _base(hf, "local", 10000.0)
        ),
        windows=windows_from_hf({"sliding_window": reach, "layer_types": kinds}, layers),
        norm_eps=hf.get("norm_eps", 1e-5),
        activation=hf.get("hidden_activation", "gelu"),
        tie_embeddings=True,
        max_positions=hf.get("max_position_embeddings", 8192),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
        extra=(
            ("norm_bias", bool(hf.get("norm_bias", False))),
            ("classifier_bias", bool(hf.get("classifier_bias", False))),
            ("classifier_pooling", pooling),
            ("classifier_activation", hf.get("classifier_activation", "gelu")),
        ),
    )


def _base(hf: Mapping[str, Any], kind: str, default: float) -> float:
    return float(hf.get(f"{kind}_rope_theta") or default)


def classifier_config(hf: Mapping[str, Any]) -> ModelConfig:
    return with_labels(modernbert_config(hf), hf)


FAMILIES = (
    Family(
        "ModernBERT encoders (GTE, Nomic)",
        ("ModernBertModel", "ModernBertForMaskedLM"),
        modernbert_config,
        ModernBert,
        gguf=("modern-bert",),
        ignore=(r"^head\.", r"^decoder\."),
        tasks=("embed",),
    ),
    Family(
        "ModernBERT rerankers (GTE) and classifiers",
        ("ModernBertForSequenceClassification",),
        classifier_config,
        ModernBertClassifier,
        tasks=("classify", "score"),
    ),
)
