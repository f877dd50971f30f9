"""BERT-like encoders (Devlin et al. 2018, arXiv:1810.04805), with the RoBERTa (Liu et al. 2019, arXiv:1907.11692) and XLM-R
checkpoints of the same network: MiniLM, BGE, E5 and others that turn texts into vectors.

Not a `CausalLM`: every token attends to every other of its text, nothing is kept, and there are no logits. `encode` gives
hidden states, `pool` (models.pooling) one vector a text. Models that tell labels or score pairs are in cross_encoder.py.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import ModelConfig, from_hf
from models.family import Family
from models.layers import Build, Embedding, LayerNorm, Linear, child_recipes, mlp_of, weight
from models.recipes import Recipes, deal, one, pieces, under
from ops.linear import embed

_MASKED = -1e30
_QUERY_BLOCK = 512
"""Query positions whose scores are in memory at once: of 8192 positions, 16 heads and one text that is 268 MB, not 4.3 GB."""


class SelfAttention(nnx.Module):
    """Bidirectional attention within each text; q, k and v are one projection, laid out [H, 3, h]."""

    names: ClassVar[tuple[str, ...]] = ("self.query", "self.key", "self.value", "output.dense")

    def __init__(self, config: ModelConfig, build: Build):
        H, h, D = config.num_heads, config.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.heads = (H, h)
        self.qkv = Linear(D, H * 3 * h, build, (axis, "embed"), bias=True)
        self.out = Linear(H * h, D, build, ("embed", axis), bias=True)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array, bias_HR: jax.Array | None = None) -> jax.Array:
        (B, S, _), (H, h) = x_BSD.shape, self.heads
        q_BSHh, k_BSHh, v_BSHh = jnp.moveaxis(self.qkv(x_BSD).reshape(B, S, H, 3, h), 3, 0)
        return self.out(attend_texts(q_BSHh, k_BSHh, v_BSHh, valid_BS, bias_HR=bias_HR).reshape(B, S, H * h))

    def recipes(self, name: str) -> Recipes:
        H, h = self.heads
        *sources, out = (f"{name}.{part}" for part in self.names)
        D = self.qkv.weight.shape[1]
        weights = pieces([f"{source}.weight" for source in sources], *((H * h, D),) * 3)
        biases = pieces([f"{source}.bias" for source in sources], *((H * h,),) * 3)
        recipes = {"qkv.weight": deal(H, *weights), "qkv.bias": deal(H, *biases)}
        return recipes | under("out", self.out.recipes(out))


def attend_texts(
    q_BSHh: jax.Array,
    k_BSHh: jax.Array,
    v_BSHh: jax.Array,
    valid_BS: jax.Array,
    reach: int | None = None,
    bias_HR: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """Every token attends to its text's others, both ways: out_BSHh.

    Args:
        valid_BS: which positions are tokens.
        reach: how far from a token those are that it attends to; None for all.
        bias_HR: added to scores by distance (key less query), from -(S - 1) to S - 1.
        scale: multiplies q . k; None for h ** -0.5.
    """
    B, S, H, h = q_BSHh.shape
    times = h**-0.5 if scale is None else scale

    def attend(q_BQHh: jax.Array, first: jax.Array | int) -> jax.Array:
        scores = jnp.einsum("bqhd,bshd->bhqs", q_BQHh, k_BSHh, preferred_element_type=jnp.float32) * times
        seen = valid_BS[:, None, None]
        position_Q = first + jnp.arange(q_BQHh.shape[1])
        if bias_HR is not None:
            scores = scores + bias_HR[:, jnp.arange(S) - position_Q[:, None] + S - 1]
        if reach is not None:
            seen = seen & (jnp.abs(position_Q[:, None] - jnp.arange(S)) <= reach)
        weights = jax.nn.softmax(jnp.where(seen, scores, _MASKED), axis=-1)
        return jnp.einsum("bhqs,bshd->bqhd", weights.astype(v_BSHh.dtype), v_BSHh)

    if S <= _QUERY_BLOCK or S % _QUERY_BLOCK:
        return attend(q_BSHh, 0)
    blocks = jnp.moveaxis(q_BSHh.reshape(B, S // _QUERY_BLOCK, _QUERY_BLOCK, H, h), 1, 0)
    firsts = jnp.arange(0, S, _QUERY_BLOCK)
    return jnp.moveaxis(jax.lax.map(lambda block: attend(*block), (blocks, firsts)), 0, 1).reshape(B, S, H, h)


class EncoderLayer(nnx.Module):
    """norm(x + attn(x)), then norm(x + mlp(x))."""

    names: ClassVar[dict[str, str]] = {
        "attn": "attention",
        "attn_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    attention: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: ModelConfig, build: Build):
        D, F = config.embed_dim, config.ffw_dim
        axis = build.axis("ffw", F)
        self.activation = config.activation
        self.attn = self.attention(config, build)
        self.attn_norm = LayerNorm(D, config.norm_eps)
        self.up = Linear(D, F, build, (axis, "embed"), bias=True)
        self.down = Linear(F, D, build, ("embed", axis), bias=True)
        self.mlp_norm = LayerNorm(D, config.norm_eps)

    def __call__(self, x_BSD: jax.Array, valid_BS: jax.Array, *bias_HR: jax.Array) -> jax.Array:
        x_BSD = self.attn_norm(x_BSD + self.attn(x_BSD, valid_BS, *bias_HR))
        return self.mlp_norm(mlp_of(self.up, self.down, self.activation, x_BSD, residual_TD=x_BSD))

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, self.names, name)


class Bert(nnx.Module):
    """`models.api.Encoder`: token, position and segment embeddings, then layers that see the whole text."""

    names: ClassVar[dict[str, str]] = {"embed": "embeddings.word_embeddings", "norm": "embeddings.LayerNorm"}
    layer: ClassVar[type[EncoderLayer]] = EncoderLayer
    layer_name: ClassVar[str] = "encoder.layer"

    def __init__(self, config: ModelConfig, build: Build):
        self.config, self.compute_dtype = config, build.compute_dtype
        D = config.embed_dim
        self.embed = Embedding(config.vocab_size, D, build)
        # RoBERTa's table begins with rows for padding, which no token uses.
        self.first_position = config.get("first_position", 0)
        self.positions = weight((self.first_position + config.max_positions, D), build.dtype, (None, "embed"))
        count = config.get("segments")
        self.segments = weight((count, D), build.dtype, (None, "embed")) if count else None
        self.norm = LayerNorm(D, config.norm_eps)
        self.layers: Any = nnx.List([self.layer(config, build) for _ in range(config.num_layers)])

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """Hidden states of B texts, each padded behind its end.

        Args:
            tokens_BS: int32 ids.
            length_B: int32 tokens of each text, 0 for a padded row.
            segments_BS: int32 which of a pair of texts a token is of; None for the first. Models with one segment, or none, read
                both texts of a pair as that one.
        Returns:
            hidden_BSD in the compute dtype; arbitrary beyond a text's end.
        """
        S = tokens_BS.shape[1]
        dtype = self.compute_dtype
        positions = jnp.arange(S, dtype=jnp.int32) + self.first_position
        x_BSD = self.embed(tokens_BS, dtype) + embed(self.positions[...], positions, dtype)
        if self.segments is not None:
            segments_BS = jnp.zeros_like(tokens_BS) if segments_BS is None else segments_BS
            segments_BS = jnp.minimum(segments_BS, self.segments.shape[0] - 1)
            x_BSD += embed(self.segments[...], segments_BS, dtype)
        x_BSD = self.norm(x_BSD)
        valid_BS = jnp.arange(S) < length_B[:, None]
        for layer in self.layers:
            x_BSD = run_layer(*nnx.split(layer), x_BSD, valid_BS)
        return x_BSD

    def recipes(self) -> Recipes:
        recipes = child_recipes(self, self.names, "")
        recipes["positions"] = one("embeddings.position_embeddings.weight", *self.positions.shape)
        if self.segments is not None:
            recipes["segments"] = one("embeddings.token_type_embeddings.weight", *self.segments.shape)
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"{self.layer_name}.{index}"))
        return recipes


@functools.partial(jax.jit, static_argnums=0)
def run_layer(graphdef: Any, state: Any, x_BSD: jax.Array, valid_BS: jax.Array, *more: jax.Array) -> jax.Array:
    """One layer of an encoder as a function of its own: equal layers are traced once.

    Args:
        graphdef, state: the layer, from `nnx.split`.
        x_BSD: [B, S, D] hidden states.
        valid_BS: [B, S] bool, whether a position holds a token.
        more: what the family's layers take besides.
    """
    return nnx.merge(graphdef, state)(x_BSD, valid_BS, *more)


def bert_config(hf: Mapping[str, Any], first_position: int = 0) -> ModelConfig:
    """BERT's numbers.

    Args:
        first_position: row of the position table that the first token takes.
    """
    kind = hf.get("position_embedding_type", "absolute")
    if kind != "absolute":
        raise ValueError(f"config.json: position_embedding_type {kind!r} is not supported; supported: 'absolute'.")
    if hf.get("is_decoder"):
        raise ValueError("config.json: is_decoder is set; this architecture is supported as an encoder.")
    return from_hf(
        hf,
        rope=None,
        norm_eps=hf.get("layer_norm_eps", 1e-12),
        activation=hf.get("hidden_act", "gelu"),
        tie_embeddings=True,
        max_positions=hf.get("max_position_embeddings", 512) - first_position,
        extra=(
            ("segments", hf.get("type_vocab_size", 2)),
            ("first_position", first_position),
        ),
    )


def roberta_config(hf: Mapping[str, Any]) -> ModelConfig:
    """RoBERTa and XLM-R: positions are counted from behind the padding's id."""
    return bert_config(hf, (1 if hf.get("pad_token_id") is None else hf["pad_token_id"]) + 1)


# Heads that were trained for something else than embeddings.
IGNORED_HEADS = (r"^(bert\.|roberta\.)?pooler\.", r"position_ids$", r"^cls\.", r"^lm_head\.")

FAMILIES = (
    Family(
        "BERT encoders (MiniLM, BGE, E5)",
        ("BertModel", "BertForMaskedLM"),
        bert_config,
        Bert,
        gguf=("bert",),
        ignore=IGNORED_HEADS,
        tasks=("embed",),
    ),
    Family(
        "RoBERTa, XLM-R and CamemBERT encoders (BGE-M3, multilingual E5)",
        ("RobertaModel", "XLMRobertaModel", "CamembertModel"),
        roberta_config,
        Bert,
        ignore=IGNORED_HEADS,
        tasks=("embed",),
    ),
)
