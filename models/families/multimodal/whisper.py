"""Whisper (Radford et al. 2022, arXiv:2212.04356): a decoder with learned positions, each of whose layers also attends to sound,
which an encoder has read (models/encoders/audio/whisper.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Cross, Step
from models.config import ModelConfig, from_hf
from models.decoder import Decoder
from models.encoders.audio.whisper import WhisperEncoder, whisper_encoder, without_k
from models.family import Family, Tower
from models.layers import MLP, Attention, Build, Layer, LayerNorm, Linear, weight
from models.layers.norms import Norm
from models.recipes import Recipes, deal, one, pieces, under
from ops.linear import embed
from ops.paged_attention import Sequences, whole
from ops.paged_attention.batch import Q_BLOCK

SOUND = r"^(model\.)?(encoder\.|decoder\.layers\.\d+\.encoder_attn\.[kv]_proj\.)"


class WhisperAttention(Attention):
    def recipes(self, name: str) -> Recipes:
        K, _, h = self.heads
        D = self.qkv.weight.shape[1]
        weights = pieces([f"{name}.{part}_proj.weight" for part in "qkv"], *((K * h, D),) * 3)
        biases = pieces([f"{name}.{part}_proj.bias" for part in "qv"], *((K * h,),) * 2)
        recipes: Recipes = {"qkv.weight": deal(K, *weights), "qkv.bias": deal(K, *without_k(*biases))}
        return recipes | under("out", self.out.recipes(f"{name}.out_proj"))


class CrossAttention(nnx.Module):
    """Attention to sound: every token sees all of it. Its keys and values were made once, see `models.api.Cross`.

    Attributes:
        paged: how many positions a sound has where they lie in pages (`WhisperEncoder`); None for plain arrays.
    """

    paged: int | None = None

    def __init__(self, config: ModelConfig, layer: int, build: Build):
        H, h, D = config.num_heads, config.head_dim, config.embed_dim
        axis = build.axis("heads", H)
        self.heads, self.layer, self.layers = (H, h), layer, config.num_layers
        self.q = Linear(D, H * h, build, (axis, "embed"), bias=True)
        self.out = Linear(H * h, D, build, ("embed", axis), bias=True)

    def __call__(self, x_TD: jax.Array, step: Step, norm: Norm, residual_TD: jax.Array) -> jax.Array:
        if (cross := step.cross) is None:
            return residual_TD
        (T, _), (H, h) = x_TD.shape, self.heads
        q_TO = self.q(x_TD, norm=norm)
        if self.paged is not None:
            how: dict[str, Any] = {"positions": self.paged, "part": self.layer, "scale": h**-0.5}
            q_THh = q_TO.reshape(T, H, h)
            if isinstance(step.attention, Sequences):
                out = whole.attend_kept_once(q_THh, cross.store_MW, **how)
            else:
                out = whole.attend_kept(q_THh, cross.store_MW, cross.row_B, cross.row_R, step.attention, **how)
            return self.out(out.reshape(T, H * h).astype(x_TD.dtype), residual_TO=residual_TD)
        D = T - len(cross.row_N) * Q_BLOCK
        rows, queries = len(cross.row_B), D // max(1, len(cross.row_B))
        store = cross.store_MW.reshape(len(cross.store_MW), self.layers, 2, H, -1, h)

        def attend(q_O: jax.Array, row_R: jax.Array, queries: int) -> jax.Array:
            q_RQHh = q_O.reshape(len(row_R), queries, H, h)
            k_RHSh, v_RHSh = store[row_R, self.layer, 0], store[row_R, self.layer, 1]
            scores = jnp.einsum("rqhd,rhsd->rhqs", q_RQHh, k_RHSh, preferred_element_type=jnp.float32) * h**-0.5
            weights = jax.nn.softmax(scores, axis=-1).astype(v_RHSh.dtype)
            return jnp.einsum("rhqs,rhsd->rqhd", weights, v_RHSh).reshape(-1, H * h)

        parts = []
        if rows:
            parts.append(attend(q_TO[:D], cross.row_B, queries))
        if len(cross.row_N):  # block by block: all at once would copy a sound's keys and values once for each
            blocks = q_TO[D:].reshape(-1, Q_BLOCK, H * h)
            one = jax.lax.map(lambda block: attend(block[0], block[1][None], Q_BLOCK), (blocks, cross.row_N))
            parts.append(one.reshape(-1, H * h))
        return self.out(jnp.concatenate(parts).astype(x_TD.dtype), residual_TO=residual_TD)

    def weights(self, x_SD: jax.Array, row_1W: jax.Array) -> jax.Array:
        """float32 [H, S, T]: what each head of each token attends to of one sound."""
        H, h = self.heads
        q_SHh = self.q(x_SD).reshape(-1, H, h)
        if self.paged is not None:
            kept = row_1W.reshape(self.layers, -1)[self.layer]
            k_HTh = whole.kept_keys(kept, self.paged, H, h).swapaxes(0, 1).astype(q_SHh.dtype)
        else:
            k_HTh = row_1W.reshape(self.layers, 2, H, -1, h)[self.layer, 0]
        scores = jnp.einsum("shd,htd->hst", q_SHh, k_HTh, preferred_element_type=jnp.float32) * h**-0.5
        return jax.nn.softmax(scores, axis=-1)

    def recipes(self, name: str) -> Recipes:
        return under("q", self.q.recipes(f"{name}.q_proj")) | under("out", self.out.recipes(f"{name}.out_proj"))


class WhisperLayer(Layer):
    names: ClassVar[dict[str, str]] = {
        "attn_norm": "self_attn_layer_norm", "attn": "self_attn", "cross_norm": "encoder_attn_layer_norm",
        "cross": "encoder_attn", "mlp_norm": "final_layer_norm",
    }  # fmt: skip

    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        self.cross_norm = self.make_norm(config)
        self.cross = CrossAttention(config, index, build)

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> WhisperAttention:
        return WhisperAttention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> MLP:
        return MLP(config, build, ("fc1", "fc2"))

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        x_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm, residual_TD=x_TD)
        x_TD = step.asked(x_TD)
        x_TD = step.asked(self.cross(x_TD, step, self.cross_norm, x_TD))
        x_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, kv, visited

    def recipes(self, name: str) -> Recipes:
        return super().recipes(name) | under("mlp", self.mlp.recipes(name))


class Whisper(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "model.decoder.embed_tokens", "norm": "model.decoder.layer_norm"}
    layer_name = "model.decoder.layers"
    first_time: int | None = None
    """The token of 0.00 s, which the checkpoint's generation_config.json says; see ops.sampling.times."""

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, WhisperLayer)
        self.positions = weight((config.max_positions, config.embed_dim), build.dtype, (None, "embed"))

    def make_norm(self, config: ModelConfig) -> LayerNorm:
        return LayerNorm(config.embed_dim, config.norm_eps)

    def embed_tokens(self, step: Step) -> jax.Array:
        return super().embed_tokens(step) + embed(self.positions[...], step.positions_T, self.compute_dtype)

    def read_pages(self, positions: int) -> None:
        """What the encoder makes lies in pages from now on."""
        for layer in self.layers:
            layer.cross.paged = positions

    def attended(self, tokens_S: jax.Array, row_1W: jax.Array, heads: tuple[tuple[int, int], ...]) -> jax.Array:
        """float32 [A, S, T]: of each of A (layer, head), what each of one sequence's tokens attends to of a sound.

        Args:
            row_1W: what the encoder made of the sound.
        """
        positions_S = jnp.arange(len(tokens_S), dtype=jnp.int32)
        attention: Any = Sequences(jnp.ones_like(tokens_S)[None], positions_S[None], single=True)
        one = jnp.zeros(1, jnp.int32)  # all tokens in one row: its keys and values would be copied for each
        step = Step(tokens_S, positions_S, attention, cross=Cross(row_1W, one, one[:0], one[:0]))
        x_SD, seen = self.embed_tokens(step), {}
        for index, layer in enumerate(self.layers):
            x_SD, _ = layer.attn(x_SD, step, None, norm=layer.attn_norm, residual_TD=x_SD)
            chosen = [head for at, head in heads if at == index]
            if chosen:
                seen[index] = layer.cross.weights(layer.cross_norm(x_SD), row_1W)[jnp.array(sorted(set(chosen)))]
            x_SD = layer.cross(x_SD, step, layer.cross_norm, x_SD)
            x_SD, _ = layer.mlp(x_SD, step, norm=layer.mlp_norm, residual_TD=x_SD)
        return jnp.concatenate([seen[index] for index in sorted(seen)])

    def recipes(self) -> Recipes:
        return super().recipes() | {"positions": one("model.decoder.embed_positions.weight", *self.positions.shape)}


def whisper_config(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("scale_embedding"):
        raise ValueError("config.json: scale_embedding is true; no published Whisper has it, and it is not served.")
    shared = {
        "architectures": hf.get("architectures"),
        "hidden_size": hf["d_model"],
        "num_hidden_layers": hf["decoder_layers"],
        "num_attention_heads": hf["decoder_attention_heads"],
        "intermediate_size": hf["decoder_ffn_dim"],
        "vocab_size": hf["vocab_size"],
        "max_position_embeddings": hf.get("max_target_positions", 448),
        "tie_word_embeddings": True,
    }
    activation = hf.get("activation_function", "gelu")
    return from_hf(shared, rope=None, norm_eps=1e-5, activation=activation, qkv_bias=True, out_bias=True, mlp_bias=True)


FAMILIES = (
    Family(
        "Whisper",
        ("WhisperForConditionalGeneration",),
        whisper_config,
        Whisper,
        ignore=(SOUND, r"^proj_out\."),
        tasks=("generate", "transcribe"),
        tower=Tower(whisper_encoder, WhisperEncoder, SOUND, "sound"),
    ),
)
