"""`ModelConfig`: every number that says what a network computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from models.mixers import Mixer
from ops.activation import activation as activation_function


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: base of the frequencies.
        dim: how many of a head's dimensions are rotated.
        kind: "default", "linear", "dynamic", "llama3", "yarn", "longrope" or "proportional".
        factor: by how much the context is stretched.
        original_max_positions: context length (tokens) before stretching; 0 where nothing is stretched.
        low_freq_factor, high_freq_factor: llama3: wavelengths beyond original/low are stretched, below original/high kept.
        beta_fast, beta_slow: yarn: rotations over the original context where its ramp starts and ends.
        attention_factor: yarn, longrope: scales cos and sin; None for the method's own rule.
        mscale, mscale_all_dim: yarn in DeepSeek's writing; 0 when absent.
        truncate: yarn: whether the ramp's ends are rounded to whole dimensions.
        short_factor, long_factor: longrope: a divisor for each frequency below and above the original context.
        proportion: proportional: the part of the frequencies that turn, the fastest ones; the others are 0.
        sections: where a position is several numbers, how many frequencies turn by each; () for one number.
        interleaved: those of the second and later numbers are every n-th frequency from the fastest on, the first number has the
            rest; else sections follow each other.
    """

    theta: float
    dim: int
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    proportion: float = 1.0
    sections: tuple[int, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(
                f"the model's configuration rotates {self.dim} dimensions of a head; they turn in pairs, so it must be even."
            )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the feed-forward block.

    Attributes:
        num_experts: E.
        experts_per_token: how many of them each token visits.
        ffw_dim: hidden width of one expert.
        layers: which layers have it; the others are dense.
        scoring: "softmax" over all experts, or "sigmoid" of each.
        normalize: the chosen experts' scores are divided by their sum.
        scale: multiplies the scores of the chosen experts.
        bias: choosing (not weighting) adds a learned bias to the scores (DeepSeek-V3).
        groups, groups_kept: experts are chosen only from the best groups; 1 and 1 for no groups.
        group_score: a group is as good as its best expert ("max") or its best two together ("top2").
        shared_ffw_dim: hidden width of the expert that every token visits; 0 for none.
        shared_gate: the shared expert's result is multiplied by a learned sigmoid gate.
    """

    num_experts: int
    experts_per_token: int
    ffw_dim: int
    layers: tuple[bool, ...]
    scoring: str = "softmax"
    normalize: bool = False
    scale: float = 1.0
    bias: bool = False
    groups: int = 1
    groups_kept: int = 1
    group_score: str = "max"
    shared_ffw_dim: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"the model's configuration has {self.experts_per_token} experts a token of {self.num_experts}."
            )
        if self.num_experts % self.groups or not 1 <= self.groups_kept <= self.groups:
            raise ValueError(
                f"the model's configuration keeps {self.groups_kept} of {self.groups} groups of {self.num_experts} experts."
            )


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434). Sizes in elements.

    Attributes:
        q_rank: width of the compressed query; None where queries are not compressed.
        kv_rank: width of the compressed key and value, which is what pages keep.
        nope_dim, rope_dim: parts of a query's and key's head without and with rotary embedding.
        v_dim: head size of values.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer. Lengths are in tokens, sizes in elements.

    Attributes:
        architecture: the name under which the registry knows it.
        vocab_size: rows of the embedding table and of the logits.
        num_layers: L.
        embed_dim: D, width of the residual stream.
        ffw_dim: F, hidden width of a dense feed-forward block.
        num_heads: H query heads.
        num_kv_heads: K key/value heads; H is a multiple of K.
        head_dim: h, size of one head.
        max_positions: the longest context that the checkpoint claims.
        norm_eps: added to the variance before the root.
        activation: of the feed-forward block, by the names of `ops.activation`.
        tie_embeddings: the logits use the embedding table.
        rope: None for learned positions.
        local_rope: of the windowed layers where it differs from `rope`.
        rope_layers: which layers rotate; None for all.
        windows: for each layer, how many positions back it attends, itself included; None for all.
        qkv_bias, out_bias, mlp_bias: whether these projections have one.
        qk_norm: "head": RMS norm over each head's q and k; "full": over all heads together; "none".
        attn_gate: attention's result is multiplied by a learned sigmoid gate, whose rows are in q's projection (Qwen3-Next).
        attn_scale: multiplies q·k; None for head_dim ** -0.5.
        attn_softcap, logits_softcap: x -> cap * tanh(x / cap); None for none.
        attn_sinks: each query head has a learned logit that takes part in its softmax without a value.
        norm_offset: RMS norm scales are stored less one (Gemma).
        embed_scale, residual_scale, logits_scale: multipliers (Granite, Gemma); 1 for none.
        moe: the mixture of experts; None for a dense model.
        mla: latent attention; None for ordinary heads.
        mixers: of each layer, what it has in place of attention; None for attention. () where all have that.
        extra: what only one family needs; hashable values.
    """

    architecture: str
    vocab_size: int
    num_layers: int
    embed_dim: int
    ffw_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm_eps: float
    activation: str = "silu"
    tie_embeddings: bool = False
    rope: RopeConfig | None = None
    local_rope: RopeConfig | None = None
    rope_layers: tuple[bool, ...] | None = None
    windows: tuple[int | None, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    norm_offset: bool = False
    attn_sinks: bool = False
    attn_gate: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    logits_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    mixers: tuple[Mixer | None, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        positive = ("vocab_size", "num_layers", "embed_dim", "num_heads", "num_kv_heads", "head_dim", "max_positions")
        for name in positive:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"the model's configuration has {name} = {value!r}; it must be a whole number from 1.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"the model's configuration has {self.num_heads} query heads, not a multiple of its "
                f"{self.num_kv_heads} key/value heads."
            )
        activation_function(self.activation)  # an unknown name is an error now, not while programs are made
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        if len(self.windows) != self.num_layers:
            raise ValueError(f"the model's configuration has {len(self.windows)} windows for {self.num_layers} layers.")
        if not self.mixers:
            object.__setattr__(self, "mixers", (None,) * self.num_layers)
        if len(self.mixers) != self.num_layers:
            raise ValueError(f"the model's configuration has {len(self.mixers)} mixers for {self.num_layers} layers.")
        by_layer = {"experts": self.moe and self.moe.layers, "rotation": self.rope_layers}
        for what, entries in by_layer.items():
            if entries is not None and len(entries) != self.num_layers:
                raise ValueError(
                    f"the model's configuration says of {len(entries)} layers of {self.num_layers} whether they have {what}."
                )

    @property
    def longest_positions(self) -> int:
        """The longest context that can be asked for: behind `max_positions`, dynamic NTK still stretches."""
        if self.rope is None or self.rope.kind != "dynamic":
            return self.max_positions
        return max(self.max_positions, int(self.rope.factor * self.rope.original_max_positions))

    @property
    def group(self) -> int:
        """G: how many query heads read one key/value head."""
        return self.num_heads // self.num_kv_heads

    def layer_rope(self, layer: int) -> RopeConfig | None:
        """The rotary embedding of one layer, or None where it does not rotate."""
        if self.rope_layers is not None and not self.rope_layers[layer]:
            return None
        return self.local_rope if self.local_rope and self.windows[layer] else self.rope

    def get(self, name: str, default: Any = None) -> Any:
        """A value of `extra`."""
        return dict(self.extra).get(name, default)


def from_hf(hf: Mapping[str, Any], partial: bool = False, **overrides: Any) -> ModelConfig:
    """Reads the fields that most decoders share from a `config.json` dictionary.

    Args:
        hf: the (text part of the) dictionary.
        partial: the family rotates the part of a head that `partial_rotary_factor` says. In the others the field has no meaning,
            as in transformers, and some files have it all the same.
        overrides: fields of `ModelConfig` that the family reads in its own way; they win.
    Raises:
        ValueError: a missing field, or a value that is not supported, by name.
    """
    heads, embed = need(hf, "num_attention_heads"), need(hf, "hidden_size")
    for name, value in (("num_attention_heads", heads), ("hidden_size", embed)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"the model's configuration has {name} = {value!r}; it must be a whole number from 1.")
    architecture = (hf.get("architectures") or ["?"])[0]
    head_dim = hf.get("head_dim") or embed // heads
    values: dict[str, Any] = {
        "architecture": architecture,
        "vocab_size": need(hf, "vocab_size"),
        "num_layers": need(hf, "num_hidden_layers"),
        "embed_dim": embed,
        "ffw_dim": hf.get("intermediate_size") or 0,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_positions": hf.get("max_position_embeddings", 2048),
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
        "activation": hf.get("hidden_act") or hf.get("hidden_activation") or "silu",
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)) or is_bare(architecture),
    }
    if "rope" not in overrides:
        part = partial_rotary(hf) if partial else None
        values["rope"] = rope_from_hf(hf, head_dim if part is None else int(head_dim * part), part=part)
        values["max_positions"] = stretched(values["rope"], values["max_positions"])
    values.update(overrides)
    return ModelConfig(**values)


WINDOWED = ("full_attention", "sliding_attention")
WHOLE = ("HeadModel", "UltravoxModel", "OmniModel")
"""How names of networks end that have heads for all their names."""


def is_bare(architecture: str) -> bool:
    """Whether a network has no head of its own, as embedding models: `LlamaModel`, but not `GPT2LMHeadModel`."""
    return architecture.endswith("Model") and not architecture.endswith(WHOLE)


def stretched(rope: RopeConfig, max_positions: int) -> int:
    """The context (tokens) that scaled positions reach. Who adds the scaling to a config.json, as model cards and
    transformers say, leaves `max_position_embeddings` as it was."""
    if rope.kind not in ("yarn", "linear"):
        return max_positions
    return max(max_positions, int(rope.factor * rope.original_max_positions))


def need(hf: Mapping[str, Any], name: str) -> Any:
    """A field that must be there."""
    if hf.get(name) is None:
        raise ValueError(f"config.json has no {name!r}: it is not a complete model configuration.")
    return hf[name]


def partial_rotary(hf: Mapping[str, Any]) -> float:
    """The rotated fraction of a head."""
    parameters = hf.get("rope_parameters") or {}
    return float(parameters.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0)


def refuse_part(part: float, dim: int) -> None:
    """Where a network rotates all dimensions it has for that, a file that asks for a part of them is no model of it.

    Args:
        part: the file's `partial_rotary_factor`.
        dim: the dimensions that are rotated.
    Raises:
        ValueError: the part is not all of them.
    """
    if int(dim * part) != dim:
        raise ValueError(
            f"config.json: partial_rotary_factor is {part:g}, and this network rotates all {dim} dimensions that it has for "
            "positions: no frequencies belong to that. Set it to 1 or leave it out."
        )


def rope_from_hf(
    hf: Mapping[str, Any],
    dim: int,
    layer_type: str | None = None,
    theta: float | None = None,
    part: float | None = None,
) -> RopeConfig:
    """Reads `rope_parameters` (new files) or `rope_theta` and `rope_scaling` (older ones).

    Args:
        dim: rotated dimensions of a head.
        layer_type: picks one of the nested dictionaries where kinds of layers differ.
        theta: the base, where the file keeps it under another name.
        part: the part of a head that `dim` is, in families that rotate a part; None in the others. Those look past the file's
            `partial_rotary_factor` while nothing is stretched; what stretches positions does not.
    Raises:
        ValueError: a scaling that is not supported, one of a part of what is rotated, or several where there is one.
    """
    parameters = dict(hf.get("rope_parameters") or {})
    if layer_type is not None and isinstance(parameters.get(layer_type), Mapping):
        parameters = dict(parameters[layer_type])
    scaling = {**(hf.get("rope_scaling") or {}), **parameters}
    if layer_type is None and (kinds := [name for name, own in scaling.items() if isinstance(own, Mapping)]):
        raise ValueError(
            f"config.json rotates layers by their kinds ({', '.join(kinds)}); those of this family rotate alike."
        )
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    kind = {"su": "longrope", "mrope": "default"}.get(kind, kind)
    supported = ("default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional")
    if kind not in supported:
        raise ValueError(f"config.json: the rotary scaling {kind!r} is not supported; supported: {list(supported)}.")
    if part is None and kind not in ("default", "proportional"):
        refuse_part(
            partial_rotary({"partial_rotary_factor": hf.get("partial_rotary_factor"), "rope_parameters": scaling}), dim
        )
    theta = theta if theta is not None else scaling.get("rope_theta", hf.get("rope_theta", 10000.0))
    max_positions = hf.get("max_position_embeddings", 2048)
    original = hf.get("original_max_position_embeddings") or scaling.get("original_max_position_embeddings")
    if kind == "dynamic":
        original = max_positions  # where transformers begins to stretch
    factor = scaling.get("factor")
    if kind in ("longrope", "yarn") and factor is None:
        factor = max_positions / original if original else 1.0
    plain = {
        name: scaling[name]
        for name in ("low_freq_factor", "high_freq_factor", "attention_factor", "truncate")
        if scaling.get(name) is not None
    }
    return RopeConfig(
        theta=float(theta),
        dim=dim,
        kind=kind,
        factor=float(factor or 1.0),
        original_max_positions=0 if kind in ("default", "proportional") else int(original or max_positions),
        beta_fast=float(scaling.get("beta_fast") or 32.0),
        beta_slow=float(scaling.get("beta_slow") or 1.0),
        mscale=float(scaling.get("mscale") or 0.0),
        mscale_all_dim=float(scaling.get("mscale_all_dim") or 0.0),
        short_factor=tuple(scaling.get("short_factor") or ()),
        long_factor=tuple(scaling.get("long_factor") or ()),
        proportion=float(scaling.get("partial_rotary_factor") or 1.0) if kind == "proportional" else 1.0,
        sections=tuple(scaling.get("mrope_section") or ()),
        interleaved=bool(scaling.get("mrope_interleaved")),
        **plain,
    )


def layer_kinds(
    told: Sequence[str], num_layers: int, known: Collection[str], field: str = "layer_types"
) -> tuple[str, ...]:
    """What a file says of each layer; lists may go on with layers that predict further tokens.

    Raises:
        ValueError: fewer kinds than layers, or one that this family does not have.
    """
    if len(told) < num_layers:
        raise ValueError(f"config.json: {field} has {len(told)} entries for {num_layers} layers.")
    if unknown := sorted({str(kind) for kind in told[:num_layers]} - {*known}):
        raise ValueError(f"config.json: {field} has {unknown}; this family has {sorted(known)}.")
    return tuple(told[:num_layers])


def windows_from_hf(hf: Mapping[str, Any], num_layers: int) -> tuple[int | None, ...]:
    """Each layer's window from `layer_types` and `sliding_window`."""
    window = hf.get("sliding_window")
    types = hf.get("layer_types")
    if types is not None:
        types = layer_kinds(types, num_layers, WINDOWED)
    if not window:
        return (None,) * num_layers
    if types is None:
        return (int(window),) * num_layers
    return tuple(int(window) if kind == "sliding_attention" else None for kind in types)
