"""Nemotron-H (NVIDIA 2025, arXiv:2504.03624) and Nemotron 3: layers of one block each, Mamba-2, attention without positions, a
dense block or experts, all of them without a gate."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import ModelConfig, MoEConfig, from_hf
from models.decoder import Decoder
from models.family import Family
from models.layers import MLP, Build, Linear, RMSNorm, attention_of, child_recipes, weight
from models.layers.mamba2 import Mamba2Mixer
from models.layers.moe import Experts, choose
from models.mixers import Mamba2
from models.recipes import Piece, Recipes, Stack, one
from ops.activation import activation
from ops.experts import in_panels

KINDS = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}


class PlainExperts(Experts):
    """E blocks down(act(up(x))).

    Args:
        width: of x.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, build: Build, width: int):
        super().__init__(config, moe, build)
        E, F = moe.num_experts, moe.ffw_dim
        expert, ffw = build.axis("experts", E), build.axis("ffw", F)
        self.gated = None
        self.sizes = (E, width, F)
        blocks = in_panels((E, F, width)) and in_panels((E, width, F))
        self.gate_up = weight((E, F, width), build.dtype, (expert, ffw, "embed"), blocks=blocks)
        self.down = weight((E, width, F), build.dtype, (expert, "embed", ffw), blocks=blocks)

    def hidden(self, gate_up_MJ: jax.Array) -> jax.Array:
        return activation(self.activation)(gate_up_MJ)

    def recipes(self, name: str, sources: tuple[str, str, str] = ("", "up_proj", "down_proj")) -> Recipes:
        E, D, F = self.sizes
        _, up, down = sources
        return {
            "gate_up": Stack(tuple(Piece(f"{name}.{e}.{up}.weight", (F, D)) for e in range(E))),
            "down": Stack(tuple(Piece(f"{name}.{e}.{down}.weight", (D, F)) for e in range(E))),
        }


class NemotronMoE(nnx.Module):
    """Router, experts between two projections to a narrower width where the model has those, and a shared expert."""

    def __init__(self, config: ModelConfig, build: Build):
        assert config.moe is not None
        self.moe, D = config.moe, config.embed_dim
        latent, E = config.get("latent"), config.moe.num_experts
        self.router = Linear(D, E, build, (None, "embed"))
        self.bias = weight((E,), jnp.float32, (None,))
        self.narrow = Linear(D, latent, build, (None, "embed"), bias=config.mlp_bias) if latent else None
        self.widen = Linear(latent, D, build, ("embed", None), bias=config.mlp_bias) if latent else None
        self.experts = PlainExperts(config, config.moe, build, latent or D)
        shared = dataclasses.replace(config, ffw_dim=config.moe.shared_ffw_dim)
        self.shared = MLP(shared, build, ("up_proj", "down_proj"))

    def __call__(
        self, x_TD: jax.Array, step: Step, norm: Any = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mixture(norm(x)) + residual, and the experts that each token visits."""
        x_TD = x_TD if norm is None else norm(x_TD)
        own = step.adapter_T
        logits_TE = self.router(x_TD, out_dtype=jnp.float32, adapter_T=own)
        ids_Tk, weights_Tk = choose(logits_TE, self.moe, self.bias[...])
        narrow_TD = x_TD if self.narrow is None else self.narrow(x_TD, adapter_T=own)
        y_TD = self.experts(narrow_TD, ids_Tk, weights_Tk)
        y_TD = y_TD if self.widen is None else self.widen(y_TD, adapter_T=own)
        shared_TD, _ = self.shared(x_TD, step, residual_TD=residual_TD)
        return y_TD + shared_TD, (ids_Tk,)

    def recipes(self, name: str) -> Recipes:
        recipes = child_recipes(self, {"router": "gate", "experts": "experts", "shared": "shared_experts"}, name)
        recipes["bias"] = one(f"{name}.gate.e_score_correction_bias", *self.bias.shape)
        if self.narrow is not None:
            recipes |= child_recipes(self, {"narrow": "fc1_latent_proj", "widen": "fc2_latent_proj"}, name)
        return recipes


class NemotronLayer(nnx.Module):
    """x + block(norm(x))."""

    def __init__(self, config: ModelConfig, index: int, build: Build):
        self.kind = config.get("kinds")[index]
        self.norm = RMSNorm(config.embed_dim, config.norm_eps)
        mixer = config.mixers[index]
        if isinstance(mixer, Mamba2):
            self.block: Any = Mamba2Mixer(config, mixer, build)
        elif self.kind == "full_attention":
            self.block = attention_of(config, index, build)
        else:
            self.block = (
                NemotronMoE(config, build) if self.kind == "moe" else MLP(config, build, ("up_proj", "down_proj"))
            )

    @property
    def kv_spec(self) -> Any:
        """What it keeps of each position."""
        return getattr(self.block, "kv_spec", None)

    @property
    def state_specs(self) -> Any:
        """What it keeps of a sequence."""
        return getattr(self.block, "state_specs", ())

    def __call__(self, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any, tuple[jax.Array, ...]]:
        if self.kind in ("moe", "mlp"):
            x_TD = step.asked(x_TD)
            x_TD, visited = self.block(x_TD, step, norm=self.norm, residual_TD=x_TD)
            return x_TD, kv, visited
        x_TD, kv = self.block(x_TD, step, kv, norm=self.norm, residual_TD=x_TD)
        return x_TD, kv, ()

    def recipes(self, name: str) -> Recipes:
        return child_recipes(self, {"norm": "norm", "block": "mixer"}, name)


class NemotronH(Decoder):
    names: ClassVar[dict[str, str]] = {"embed": "model.embeddings", "norm": "model.norm_f"}

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build, NemotronLayer)


def nemotron_h_config(hf: Mapping[str, Any]) -> ModelConfig:
    told = hf.get("layers_block_type") or hf.get("layer_types") or hf.get("hybrid_override_pattern")
    if told is None:
        told = "ME*-"  # transformers' own
    kinds = tuple(KINDS.get(kind) or OLDER.get(kind, kind) for kind in told)
    if unknown := sorted({*kinds} - {*KINDS.values()}):
        raise ValueError(f"config.json: layers_block_type has {unknown}; this family has {sorted(KINDS.values())}.")
    groups = hf.get("mamba_n_groups") or hf["n_groups"]
    mamba = Mamba2(
        hf["mamba_num_heads"],
        hf["mamba_head_dim"],
        hf["ssm_state_size"],
        groups,
        hf.get("mamba_d_conv") or hf["conv_kernel"],
        conv_bias=bool(hf.get("mamba_conv_bias", hf.get("use_conv_bias", True))),
        bias=bool(hf.get("use_bias", False)),
        norm_groups=groups,
        activation=hf.get("mamba_hidden_act", "silu"),
        # Steps are not clipped: of NVIDIA's own code and transformers neither does so while decoding, and a prompt's state must
        # not depend on how it was computed.
    )
    moe = None
    if "moe" in kinds:
        moe = MoEConfig(
            hf["n_routed_experts"],
            hf["num_experts_per_tok"],
            hf["moe_intermediate_size"],
            tuple(kind == "moe" for kind in kinds),
            scoring="sigmoid",
            normalize=bool(hf.get("norm_topk_prob", True)),
            scale=float(hf.get("routed_scaling_factor", 1.0)),
            bias=True,
            groups=hf.get("n_group") or 1,
            groups_kept=hf.get("topk_group") or 1,
            group_score="top2",
            shared_ffw_dim=hf["moe_shared_expert_intermediate_size"],
        )
    return from_hf(
        {**hf, "num_hidden_layers": len(kinds), "rms_norm_eps": hf["layer_norm_epsilon"]},
        rope=None,
        activation=hf.get("mlp_hidden_act", "relu2"),
        mlp_bias=bool(hf.get("mlp_bias", False)),
        mixers=tuple(mamba if kind == "linear_attention" else None for kind in kinds),
        moe=moe,
        extra=(("kinds", kinds), ("latent", hf.get("moe_latent_size"))),
    )


FAMILIES = (
    Family(
        "Nemotron-H, Nemotron 3",
        ("NemotronHForCausalLM",),
        nemotron_h_config,
        NemotronH,
        gguf=("nemotron_h", "nemotron_h_moe"),
        ignore=(r"^mtp\.", r"^model\.mtp\."),
    ),
)
