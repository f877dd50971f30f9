"""Gemma 4 (Google 2026): Gemma 3's layers with larger heads in those that see all, per-layer embeddings, last layers that
read the pages of earlier ones, and in some sizes experts beside the dense block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import WINDOWED, ModelConfig, MoEConfig, from_hf, layer_kinds, rope_from_hf
from models.decoder import Decoder
from models.encoders.audio.gemma4 import Gemma4Audio, gemma4_audio
from models.encoders.senses import Senses
from models.encoders.vision.gemma4 import Gemma4Vision, gemma4_vision
from models.encoders.vit import VitConfig
from models.families.gemma.gemma import GemmaLayer
from models.family import Family, Tower
from models.layers import Build, GatedMLP, Linear, heads_of, weight
from models.layers.attention import HeadNormAttention, SharedAttention
from models.layers.moe import Experts, choose
from models.layers.per_layer import PerLayerEmbeddings, PerLayerMix
from models.recipes import Piece, Recipes, deal, one, pieces, split, under
from ops.norm import rms_norm
from ops.paged_attention import attend
from ops.rope import rope

SENSES = r"^(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio)\."
BESIDE = (SENSES,)
SHARED = r"^model\.layers\.({})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\."
"""What published files have in layers that read others' pages."""


@dataclasses.dataclass(frozen=True)
class Gemma4:
    """What only these models have.

    Attributes:
        heads: of each layer, (KV heads, head size).
        reads_of: of each layer, the layer whose pages it reads; None for its own.
        ffw_dims: of each layer's dense block.
        k_is_v: layers that see all have one projection for both.
        per_layer: (rows, width) of the per-layer embeddings; None for none.
        padding: the token whose per-layer embeddings an image's places have.
    """

    heads: tuple[tuple[int, int], ...]
    reads_of: tuple[int | None, ...]
    ffw_dims: tuple[int, ...]
    k_is_v: bool
    per_layer: tuple[int, int] | None
    padding: int = 0


class Gemma4Attention(HeadNormAttention):
    """Norms over each head's q, k and v, the last one without a scale."""

    def __init__(self, config: ModelConfig, layer: int, build: Build, k_is_v: bool = False):
        super().__init__(config, layer, build)
        self.k_is_v, self.eps = k_is_v, config.norm_eps

    def attend(self, qkv_TKgh: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        q_TKGh, k_TKh, v_TKh = heads_of(qkv_TKgh)
        v_TKh = rms_norm(v_TKh, jnp.ones(v_TKh.shape[-1], jnp.float32), self.eps)
        q_TKGh, k_TKh = self.normed(q_TKGh, k_TKh)
        if self.rotary is not None:
            q_TKGh, k_TKh = (rope(x, step.positions_T, *self.rotary) for x in (q_TKGh, k_TKh))
        return attend(q_TKGh, k_TKh, v_TKh, kv, step.attention, **self.scoring)

    def recipes(self, name: str) -> Recipes:
        recipes = super().recipes(name)
        if self.k_is_v:
            (K, G, h), D = self.heads, self.qkv.weight.shape[1]
            q, k = pieces([f"{name}.{part}_proj.weight" for part in "qk"], (K * G * h, D), (K * h, D))
            recipes["qkv.weight"] = deal(K, q, k, k)
            if self.qkv.bias is not None:
                q, k = pieces([f"{name}.{part}_proj.bias" for part in "qk"], (K * G * h,), (K * h,))
                recipes["qkv.bias"] = deal(K, q, k, k)
        return recipes


class Gemma4Experts(nnx.Module):
    """A router with scales of its own, and experts that the checkpoint has in two tensors."""

    def __init__(self, config: ModelConfig, build: Build):
        assert config.moe is not None
        D, E = config.embed_dim, config.moe.num_experts
        self.moe, self.eps = config.moe, config.norm_eps
        self.router = Linear(D, E, build, (None, "embed"))
        self.scale = weight((D,), jnp.float32, (None,))
        self.expert_scale = weight((E,), jnp.float32, (None,))
        self.experts = Experts(config, config.moe, build)

    def __call__(
        self, x_TD: jax.Array, normed_TD: jax.Array, adapter_T: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        """The mixture of `normed_TD`, chosen by x, and the experts that each token visits."""
        routed_TD = rms_norm(x_TD, self.scale[...] * x_TD.shape[-1] ** -0.5, self.eps)
        logits_TE = self.router(routed_TD, out_dtype=jnp.float32, adapter_T=adapter_T)
        ids_Tk, weights_Tk = choose(logits_TE, self.moe, None)
        weights_Tk = weights_Tk * self.expert_scale[...][ids_Tk]
        return self.experts(normed_TD, ids_Tk, weights_Tk, adapter_T), ids_Tk

    def recipes(self, name: str) -> Recipes:
        E, D, F = self.experts.sizes
        both = Piece(f"{name}.experts.gate_up_proj", (E, 2 * F, D))
        shards = self.experts.shards
        return under("router", self.router.recipes(f"{name}.router.proj")) | {
            "scale": one(f"{name}.router.scale", D),
            "expert_scale": one(f"{name}.router.per_expert_scale", E),
            "experts.gate_up": both if shards == 1 else deal(E * shards, *split(both, F, F)),
            "experts.down": one(f"{name}.experts.down_proj", E, D, F),
        }


class Gemma4Layer(GemmaLayer):
    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        own: Gemma4 = config.get("gemma4")
        self.sees_all = config.windows[index] is None
        self.scale = weight((1,), jnp.float32, (None,))
        self.mix = PerLayerMix(config, build, own.per_layer[1]) if own.per_layer else None
        self.experts = Gemma4Experts(config, build) if config.moe else None
        if self.experts is not None:
            self.dense_out_norm, self.experts_norm, self.experts_out_norm = (self.make_norm(config) for _ in range(3))

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        own: Gemma4 = config.get("gemma4")
        (kv_heads, head_dim), reads_of = own.heads[index], own.reads_of[index]
        config = dataclasses.replace(config, num_kv_heads=kv_heads, head_dim=head_dim)
        if reads_of is not None:
            return SharedAttention(config, index, build, reads_of)
        return Gemma4Attention(config, index, build, own.k_is_v and config.windows[index] is None)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GatedMLP:
        return GatedMLP(config, build, config.get("gemma4").ffw_dims[index])

    def __call__(
        self, x_TD: jax.Array, step: Step, kv: Any, own_TP: jax.Array | None = None
    ) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        if self.sees_all and getattr(step.attention, "chunk_ahead_C", None) is not None:
            # An image's tokens attend to those behind them in layers with windows alone.
            step = dataclasses.replace(step, attention=dataclasses.replace(step.attention, chunk_ahead_C=None))
        attended_TD, kv = self.attn(x_TD, step, kv, norm=self.attn_norm)
        x_TD = step.asked(x_TD + self.attn_out_norm(attended_TD))
        y_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm)
        if self.experts is not None:
            mixture_TD, ids_Tk = self.experts(x_TD, self.experts_norm(x_TD), step.adapter_T)
            y_TD, visited = self.dense_out_norm(y_TD) + self.experts_out_norm(mixture_TD), (ids_Tk,)
        x_TD = x_TD + self.mlp_out_norm(y_TD)
        if self.mix is not None and own_TP is not None:
            x_TD = x_TD + self.mix(x_TD, own_TP, step.adapter_T)
        return x_TD * self.scale[...].astype(x_TD.dtype), kv, visited

    def recipes(self, name: str) -> Recipes:
        recipes = super().recipes(name) | {"scale": one(f"{name}.layer_scalar", 1)}
        if self.mix is not None:
            recipes |= under("mix", self.mix.recipes(name))
        if self.experts is not None:
            recipes |= under("experts", self.experts.recipes(name))
            for norm, its in (
                ("dense_out_norm", "post_feedforward_layernorm_1"),
                ("experts_norm", "pre_feedforward_layernorm_2"),
                ("experts_out_norm", "post_feedforward_layernorm_2"),
            ):
                recipes |= under(norm, getattr(self, norm).recipes(f"{name}.{its}"))
        return recipes


class Gemma4Decoder(Decoder):
    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, Gemma4Layer)
        per_layer = config.get("gemma4").per_layer
        self.per_layer = PerLayerEmbeddings(config, build, *per_layer) if per_layer else None

    def beside(self, step: Step, x_TD: jax.Array) -> tuple[tuple[jax.Array, ...], ...]:
        if self.per_layer is None:
            return ((),) * len(self.layers)
        tokens_T = step.tokens_T
        if step.embeddings is not None:
            tokens_T = jnp.where(step.embeddings.index_T >= 0, self.config.get("gemma4").padding, tokens_T)
        return tuple((own_TP,) for own_TP in self.per_layer(tokens_T, x_TD, step.adapter_T))

    @property
    def unused(self) -> tuple[str, ...]:
        sharing = [str(i) for i, other in enumerate(self.config.get("gemma4").reads_of) if other is not None]
        return (SHARED.format("|".join(sharing)),) if sharing else ()

    def recipes(self) -> Recipes:
        return super().recipes() | (
            {} if self.per_layer is None else under("per_layer", self.per_layer.recipes("model"))
        )


def shared_layers(kinds: tuple[str, ...], count: int) -> tuple[int | None, ...]:
    """Of each layer the one whose pages it reads: the last `count` ones read those of the last of their kind before them."""
    first = len(kinds) - count
    if missing := {*kinds[first:]} - {*kinds[:first]}:
        raise ValueError(f"config.json: the layers that share K and V are {sorted(missing)}, and none before them is.")
    last = {kind: index for index, kind in enumerate(kinds[:first])}
    return tuple(None if index < first else last[kind] for index, kind in enumerate(kinds))


def kinds_of(hf: Mapping[str, Any], every: int) -> tuple[str, ...]:
    """Each layer's kind; one in `every` sees all, where the file does not say."""
    layers = hf["num_hidden_layers"]
    told = hf.get("layer_types") or [
        "full_attention" if (index + 1) % every == 0 else "sliding_attention" for index in range(layers)
    ]
    return layer_kinds(told, layers, WINDOWED)


def gemma4_config(hf: Mapping[str, Any]) -> ModelConfig:
    if hf.get("use_bidirectional_attention") == "all":
        raise ValueError("config.json: use_bidirectional_attention is 'all'; this is no model that generates.")
    kinds = kinds_of(hf, 6)
    kinds = (*kinds[:-1], "full_attention")  # whatever the file says, as transformers has it
    windows = tuple(hf["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
    k_is_v, head = bool(hf.get("attention_k_eq_v")), (hf["num_key_value_heads"], hf["head_dim"])
    wide = (hf.get("num_global_key_value_heads") if k_is_v else None) or head[0], hf.get("global_head_dim") or 512
    by_layer = hf.get("per_layer_config")
    if by_layer is not None:  # as transformers saves it
        said = {int(index): fields for index, fields in by_layer.items()}  # "05"
        own = [said.get(index, {}) for index in range(len(kinds))]
        heads = [(one.get("num_key_value_heads", head[0]), one.get("head_dim", head[1])) for one in own]
        wide = next((heads[index] for index, kind in enumerate(kinds) if kind == "full_attention"), wide)
        head = next((heads[index] for index, kind in enumerate(kinds) if kind != "full_attention"), head)
        if odd := [i for i, window in enumerate(windows) if heads[i][1] != (head if window else wide)[1]]:
            raise ValueError(
                f"config.json: per_layer_config gives layer {odd[0]} heads of {heads[odd[0]][1]}, and others of its kind have "
                "other ones; they rotate alike."
            )
    else:
        heads = [head if window else wide for window in windows]
    reads_of = shared_layers(kinds, hf.get("num_kv_shared_layers") or 0)
    double = bool(hf.get("use_double_wide_mlp"))
    ffw = [hf["intermediate_size"] * (2 if double and other is not None else 1) for other in reads_of]
    width = hf.get("hidden_size_per_layer_input")
    per_layer = (hf["vocab_size_per_layer_input"], width) if width else None
    gemma4 = Gemma4(tuple(heads), reads_of, tuple(ffw), k_is_v, per_layer, int(hf.get("pad_token_id") or 0))
    moe = None
    if hf.get("enable_moe_block"):
        moe = MoEConfig(
            hf["num_experts"], hf["top_k_experts"], hf["moe_intermediate_size"], (True,) * len(kinds), normalize=True
        )
    parameters = hf.get("rope_parameters") or {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    }
    hf = {**hf, "rope_parameters": parameters}
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        hf,
        activation=hf.get("hidden_activation") or "gelu_pytorch_tanh",
        embed_scale=hf["hidden_size"] ** 0.5,
        attn_scale=1.0,
        qk_norm="head",
        windows=windows,
        qkv_bias=bias,
        out_bias=bias,
        logits_softcap=hf.get("final_logit_softcapping"),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        rope=rope_from_hf(hf, wide[1], "full_attention"),
        local_rope=rope_from_hf(hf, head[1], "sliding_attention"),
        moe=moe,
        extra=(("gemma4", gemma4),),
    )


def gemma4_senses(hf: Mapping[str, Any]) -> VitConfig:
    """Of eyes, and of ears where config.json has them."""
    return dataclasses.replace(gemma4_vision(hf), ears=gemma4_audio(hf))


def gemma4_tower(config: VitConfig, build: Build) -> Gemma4Vision | Senses:
    """Eyes, and in the smaller sizes ears."""
    eyes = Gemma4Vision(config, build)
    return eyes if config.ears is None else Senses(eyes, Gemma4Audio(config.ears, build))


BY_LAYER = ("num_key_value_heads", "head_dim")
FAMILIES = (
    Family(
        "Gemma 4 (text)",
        ("Gemma4ForCausalLM",),
        gemma4_config,
        Gemma4Decoder,
        gguf=("gemma4",),
        ignore=BESIDE,
        by_layer=BY_LAYER,
    ),
    Family(
        "Gemma 4",
        ("Gemma4ForConditionalGeneration",),
        gemma4_config,
        Gemma4Decoder,
        ignore=BESIDE,
        tower=Tower(gemma4_senses, gemma4_tower, SENSES, videos=True),
        by_layer=BY_LAYER,
    ),
)
