"""Gemma 3n, text (Google 2025): several residual streams of which each layer computes one (AltUp, arXiv:2301.13310), a low-rank
path beside attention (LAuReL, arXiv:2411.07501), per-layer embeddings, last layers that read the pages of earlier ones, and
sparse activations."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import KVCache, Result, Step
from models.config import ModelConfig, from_hf, rope_from_hf
from models.decoder import Decoder, run_layer
from models.encoders.audio.gemma3n import Gemma3nAudio, gemma3n_audio, hard_embeddings
from models.families.gemma.gemma import GemmaLayer
from models.families.gemma.gemma4 import BESIDE, SHARED, Gemma4Attention, kinds_of, shared_layers
from models.family import Family, Tower
from models.kept import Cache
from models.layers import Build, GatedMLP, Linear, RMSNorm, child_recipes, weight
from models.layers.attention import SharedAttention
from models.layers.norms import Norm
from models.layers.per_layer import PerLayerEmbeddings, PerLayerMix
from models.recipes import Recipes, deal, one, under
from ops.activation import activation

LEAST_MAGNITUDE = 1e-5  # of a stream's mean square; no checkpoint says another


@dataclasses.dataclass(frozen=True)
class Gemma3n:
    """What only these models have.

    Attributes:
        reads_of: of each layer, the layer whose pages it reads; None for its own.
        ffw_dims: of each layer.
        sparsity: of each layer, the part of its gate's channels that is cut off.
        streams: residual streams.
        active: the one that layers compute.
        scale_active: what the per-layer embedding is mixed with has learned scales.
        laurel_rank: of the path beside attention.
        per_layer: (rows, width) of the per-layer embeddings.
        hard: of the eyes and the ears beside it, whose tokens have embeddings of their own; none of texts alone.
    """

    reads_of: tuple[int | None, ...]
    ffw_dims: tuple[int, ...]
    sparsity: tuple[float, ...]
    streams: int
    active: int
    scale_active: bool
    laurel_rank: int
    per_layer: tuple[int, int]
    hard: tuple[HardTokens, ...] = ()


@dataclasses.dataclass(frozen=True)
class HardTokens:
    """Tokens of a tower's vocabulary.

    Attributes:
        name: of what embeds them, in checkpoints.
        first, end: the tokens.
        rows, width, norm_eps: of its table.
    """

    name: str
    first: int
    end: int
    rows: int
    width: int
    norm_eps: float


class SparseMLP(GatedMLP):
    """The gate's channels count by how far they are beyond a threshold: as many standard deviations above the mean as a normal
    distribution has its `sparsity` quantile."""

    def __init__(self, config: ModelConfig, build: Build, ffw_dim: int, sparsity: float):
        super().__init__(config, build, ffw_dim)
        self.deviations = statistics.NormalDist().inv_cdf(sparsity)

    def __call__(
        self, x_TD: jax.Array, step: Step | None, norm: Norm | None = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        adapter_T = None if step is None else step.adapter_T
        hidden = self.gate_up(x_TD, norm=norm, adapter_T=adapter_T).reshape(x_TD.shape[0], self.shards, 2, -1)
        gate = hidden[:, :, 0]
        mean, deviation = (f(gate, axis=(1, 2), keepdims=True) for f in (jnp.mean, jnp.std))
        gate = jax.nn.relu(gate - (mean + deviation * self.deviations))
        hidden_TF = (activation(self.activation)(gate) * hidden[:, :, 1]).reshape(x_TD.shape[0], -1)
        return self.down(hidden_TF, residual_TO=residual_TD, adapter_T=adapter_T), ()


class AltUp(nnx.Module):
    """Predicts every stream from all, and corrects all by what became of the active one."""

    def __init__(self, config: ModelConfig, build: Build):
        own: Gemma3n = config.get("gemma3n")
        N, D = own.streams, config.embed_dim
        self.active, self.scaled = own.active, own.scale_active
        self.norm = RMSNorm(D, config.norm_eps)
        self.router = Linear(D, N, build, (None, "embed"))
        self.predict = Linear(N, N * N, build, (None, None))
        self.correct = Linear(N, N, build, (None, None))
        self.scale = weight((D,), jnp.float32, (None,))

    def modalities(self, x_TD: jax.Array, adapter_T: jax.Array | None) -> jax.Array:
        normed_TD = self.norm(x_TD) / x_TD.shape[-1]
        return jnp.tanh(self.router(normed_TD, out_dtype=jnp.float32, adapter_T=adapter_T)).astype(x_TD.dtype)

    def predicted(self, x_NTD: jax.Array, adapter_T: jax.Array | None) -> jax.Array:
        N, T = x_NTD.shape[:2]
        mix_TNM = self.predict(self.modalities(x_NTD[self.active], adapter_T), adapter_T=adapter_T).reshape(T, N, N)
        return x_NTD + jnp.einsum("mtd,tnm->ntd", x_NTD, mix_TNM.astype(x_NTD.dtype))

    def corrected(self, x_NTD: jax.Array, activated_TD: jax.Array, adapter_T: jax.Array | None) -> jax.Array:
        share_TN = self.correct(self.modalities(activated_TD, adapter_T), adapter_T=adapter_T) + 1.0
        return x_NTD + (activated_TD - x_NTD[self.active]) * share_TN.T[..., None].astype(x_NTD.dtype)

    def scaled_active(self, x_NTD: jax.Array) -> jax.Array:
        x_TD = x_NTD[self.active]
        return x_TD * self.scale[...].astype(x_TD.dtype) if self.scaled else x_TD

    def recipes(self, name: str) -> Recipes:
        names = {"norm": "router_norm", "router": "modality_router"}
        names |= {"predict": "prediction_coefs", "correct": "correction_coefs"}
        return child_recipes(self, names, name) | {"scale": one(f"{name}.correct_output_scale", *self.scale.shape)}


class Gemma3nLayer(GemmaLayer):
    def __init__(self, config: ModelConfig, index: int, build: Build):
        super().__init__(config, index, build)
        own: Gemma3n = config.get("gemma3n")
        self.altup = AltUp(config, build)
        self.left = Linear(config.embed_dim, own.laurel_rank, build, (None, "embed"))
        self.right = Linear(own.laurel_rank, config.embed_dim, build, ("embed", None))
        self.laurel_norm = self.make_norm(config)
        self.mix = PerLayerMix(config, build, own.per_layer[1])

    def make_attention(self, config: ModelConfig, index: int, build: Build) -> Any:
        reads_of = config.get("gemma3n").reads_of[index]
        if reads_of is not None:
            return SharedAttention(config, index, build, reads_of)
        return Gemma4Attention(config, index, build)

    def make_mlp(self, config: ModelConfig, index: int, build: Build) -> GatedMLP:
        own: Gemma3n = config.get("gemma3n")
        ffw_dim, sparsity = own.ffw_dims[index], own.sparsity[index]
        return SparseMLP(config, build, ffw_dim, sparsity) if sparsity > 0 else GatedMLP(config, build, ffw_dim)

    def __call__(self, x_NTD: jax.Array, step: Step, kv: Any, own_TP: jax.Array) -> tuple[jax.Array, Any, tuple[()]]:
        own = step.adapter_T
        x_NTD = self.altup.predicted(x_NTD, own)
        x_TD = x_NTD[self.altup.active]
        normed_TD = self.attn_norm(x_TD)
        laurel_TD = normed_TD + self.laurel_norm(self.right(self.left(normed_TD, adapter_T=own), adapter_T=own))
        attended_TD, kv = self.attn(normed_TD, step, kv)
        x_TD = step.asked((x_TD + self.attn_out_norm(attended_TD) + laurel_TD) * 2.0**-0.5)
        y_TD, _ = self.mlp(x_TD, step, norm=self.mlp_norm)
        x_NTD = self.altup.corrected(x_NTD, x_TD + self.mlp_out_norm(y_TD), own)
        # Streams behind the first, whichever is active.
        return x_NTD.at[1:].add(self.mix(self.altup.scaled_active(x_NTD), own_TP, own)), kv, ()

    def recipes(self, name: str) -> Recipes:
        recipes = super().recipes(name) | under("altup", self.altup.recipes(f"{name}.altup"))
        names = {"left": "linear_left", "right": "linear_right", "laurel_norm": "post_laurel_norm"}
        recipes |= child_recipes(self, names, f"{name}.laurel")
        return recipes | under("mix", self.mix.recipes(name))


class Gemma3nDecoder(Decoder):
    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, Gemma3nLayer)
        own: Gemma3n = config.get("gemma3n")
        self.per_layer = PerLayerEmbeddings(config, build, *own.per_layer)

        def projections() -> Any:
            axes = ("embed", "embed")
            return nnx.List([Linear(config.embed_dim, config.embed_dim, build, axes) for _ in range(own.streams - 1)])

        self.split, self.join = projections(), projections()
        count = sum(tokens.end - tokens.first for tokens in own.hard)
        self.hard = weight((count, config.embed_dim), jnp.float32, (None, None)) if count else None

    def embed_tokens(self, step: Step) -> jax.Array:
        x_TD = super().embed_tokens(dataclasses.replace(step, embeddings=None))
        if self.hard is not None:
            index_T = step.tokens_T - self.config.get("gemma3n").hard[0].first
            known_T = (index_T >= 0) & (index_T < len(self.hard[...]))
            rows_TD = self.hard[...][jnp.where(known_T, index_T, 0)].astype(x_TD.dtype)
            x_TD = jnp.where(known_T[:, None], rows_TD, x_TD)
        return x_TD if step.embeddings is None else step.embeddings.placed(x_TD)

    def forward(self, step: Step, cache: KVCache) -> Result:
        steps, ends, parts = step.by_group(), step.at_end(), Cache(self.kept, step.attention, cache)
        x_TD = self.embed_tokens(step)
        own = self.per_layer(step.tokens_T, x_TD, step.adapter_T)
        adapter_T = step.adapter_T
        x_NTD = jnp.stack([x_TD, *(_as_large(split(x_TD, adapter_T=adapter_T), x_TD) for split in self.split)])
        entered = []
        for index, layer in enumerate(self.layers):
            entered.append(x_NTD)
            group, kept = parts.of(index)
            its = (steps if index < self.kept.last else ends)[group]
            if index > self.kept.last:
                x_NTD = its.asked(x_NTD)
            x_NTD, kept, _ = run_layer(*nnx.split(layer), x_NTD, its, kept, own[index])
            parts.put(index, kept)
        taps = tuple(self.joined([*entered, x_NTD][index], adapter_T) for index in step.taps)
        return Result(self.norm(self.joined(x_NTD, adapter_T)), parts.whole(), taps)

    def joined(self, x_NTD: jax.Array, adapter_T: jax.Array | None) -> jax.Array:
        """One residual stream of all."""
        streams = zip(self.join, x_NTD[1:], strict=True)
        others = (_as_large(join(x_TD, adapter_T=adapter_T), x_NTD[0]) for join, x_TD in streams)
        return jnp.mean(jnp.stack([x_NTD[0], *others]), axis=0)

    @property
    def unused(self) -> tuple[str, ...]:
        sharing = [str(i) for i, other in enumerate(self.config.get("gemma3n").reads_of) if other is not None]
        return (SHARED.format("|".join(sharing)),) if sharing else ()

    def recipes(self) -> Recipes:
        recipes = super().recipes() | under("per_layer", self.per_layer.recipes("model"))
        for path, name in (("split", "altup_projections"), ("join", "altup_unembed_projections")):
            for index, linear in enumerate(getattr(self, path)):
                recipes |= under(f"{path}.{index}", linear.recipes(f"model.{name}.{index}"))
        if self.hard is not None:
            D = self.config.embed_dim
            recipes["hard"] = deal(
                1,
                *(
                    hard_embeddings(of.name, of.rows, of.width, D, of.norm_eps, 0, of.end - of.first)
                    for of in self.config.get("gemma3n").hard
                ),
            )
        return recipes


def _as_large(x_TD: jax.Array, like_TD: jax.Array) -> jax.Array:
    """x, as large as the other at each token."""
    wanted, found = (jnp.mean(x**2, axis=-1, keepdims=True) for x in (like_TD, x_TD))
    return x_TD * jnp.sqrt(wanted) / jnp.sqrt(jnp.maximum(found, LEAST_MAGNITUDE))


def hard_tokens(hf: Mapping[str, Any]) -> tuple[HardTokens, ...]:
    """Of a checkpoint with eyes and ears: their tokens stand behind those of texts, the ears' last."""
    parts = (
        ("model.embed_vision", "vision_config", 262_144, 2048),
        ("model.embed_audio", "audio_config", 262_272, 1536),
    )
    if any(not isinstance(hf.get(part), Mapping) for _, part, _, _ in parts):
        return ()

    def tokens(name: str, said: Mapping[str, Any], first: int, width: int, end: int | None) -> HardTokens:
        rows, first = int(said.get("vocab_size") or 128), int(said.get("vocab_offset") or first)
        end = first + rows if end is None else end
        if not 0 < end - first <= rows:
            raise ValueError(
                f"config.json: tokens from {first} to {end} have {rows} embeddings; there is one for each."
            )
        width, eps = int(said.get("hidden_size") or width), float(said.get("rms_norm_eps") or 1e-6)
        return HardTokens(name, first, end, rows, width, eps)

    eyes, ears = parts
    heard = tokens(ears[0], hf["audio_config"], ears[2], ears[3], None)
    return (tokens(eyes[0], hf["vision_config"], eyes[2], eyes[3], heard.first), heard)


def gemma3n_config(hf: Mapping[str, Any]) -> ModelConfig:
    kinds, layers = kinds_of(hf, 5), hf["num_hidden_layers"]
    windows = tuple(hf["sliding_window"] if kind == "sliding_attention" else None for kind in kinds)
    ffw, sparsity = hf["intermediate_size"], hf.get("activation_sparsity_pattern")
    if sparsity is None:
        sparsity = [0.95] * (10 if layers > 10 else 0) + [0.0] * (layers if layers <= 10 else layers - 10)
    elif not isinstance(sparsity, list | tuple):
        sparsity = [sparsity] * layers
    ffw = [ffw] * layers if isinstance(ffw, int) else ffw
    for name, values in (("intermediate_size", ffw), ("activation_sparsity_pattern", sparsity)):
        if len(values) != layers:
            raise ValueError(f"config.json: {name} has {len(values)} values for {layers} layers.")
    own = Gemma3n(
        shared_layers(kinds, hf.get("num_kv_shared_layers") or 0),
        tuple(ffw),
        tuple(map(float, sparsity)),
        hf["altup_num_inputs"],
        hf["altup_active_idx"],
        bool(hf.get("altup_correct_scale", True)),
        hf["laurel_rank"],
        (hf["vocab_size_per_layer_input"], hf["hidden_size_per_layer_input"]),
        hard_tokens(hf),
    )
    parameters = hf.get("rope_parameters") or {}
    local = {"rope_theta": hf.get("rope_local_base_freq") or 1e4}
    if "sliding_attention" in parameters:
        local = {"rope_parameters": parameters}
    bias = bool(hf.get("attention_bias", False))
    return from_hf(
        {**hf, "intermediate_size": max(ffw)},
        activation=hf.get("hidden_activation") or "gelu_pytorch_tanh",
        embed_scale=hf["hidden_size"] ** 0.5,
        attn_scale=1.0,
        qk_norm="head",
        windows=windows,
        qkv_bias=bias,
        out_bias=bias,
        logits_softcap=hf.get("final_logit_softcapping"),
        tie_embeddings=hf.get("tie_word_embeddings", True),
        rope=rope_from_hf(
            hf,
            hf["head_dim"],
            "full_attention",
            None if "full_attention" in parameters else hf.get("rope_theta") or 1e6,
        ),
        local_rope=rope_from_hf(local, hf["head_dim"], "sliding_attention"),
        extra=(("gemma3n", own),),
    )


AUDIO = r"^(model\.)?(audio_tower|embed_audio)\."
FAMILIES = (
    Family(
        "Gemma 3n (text)", ("Gemma3nForCausalLM",), gemma3n_config, Gemma3nDecoder, gguf=("gemma3n",), ignore=BESIDE
    ),
    Family(
        "Gemma 3n",
        ("Gemma3nForConditionalGeneration",),
        gemma3n_config,
        Gemma3nDecoder,
        ignore=BESIDE,
        tower=Tower(gemma3n_audio, Gemma3nAudio, AUDIO, "audio"),
    ),
)
