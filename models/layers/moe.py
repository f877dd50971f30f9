"""Mixtures of experts (Shazeer et al. 2017, arXiv:1701.06538): a router, experts of which each token visits k, and
perhaps a shared expert that every token visits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.api import Step
from models.config import ModelConfig, MoEConfig
from models.layers.build import Build, weight
from models.layers.linear import AdapterStack, Linear
from models.layers.mlp import GatedMLP
from models.recipes import Piece, Recipes, Stack, deal, one, under
from ops.activation import activation
from ops.experts import can_pack, experts, in_panels
from ops.lora.experts import ExpertAdapters


class Experts(nnx.Module):
    """E gated feed-forward blocks in stacked arrays; see `GatedMLP` for the rows' order.

    Args:
        bias: both products have one.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, build: Build, bias: bool = False):
        E, D, F = moe.num_experts, config.embed_dim, moe.ffw_dim
        self.sizes = (E, D, F)  # whatever layout the weights come to lie in
        expert, ffw = build.axis("experts", E), build.axis("ffw", F)
        self.shards, self.activation = build.shards("ffw", F), config.activation
        # What native kernels compute by themselves: act(gate) * up, the gate's rows first.
        plain = type(self).gate is Experts.gate and self.shards == 1
        self.gated = config.activation if plain else None
        packed = can_pack((E, 2 * F, D), self.gated) and can_pack((E, D, F), self.gated)
        up_axes, down_axes = (expert, ffw, "embed"), (expert, "embed", ffw)
        kinds = {"packed": packed, "blocks": in_panels((E, 2 * F, D)) and in_panels((E, D, F))}
        self.gate_up = weight((E, 2 * F, D), build.dtype, up_axes, gate_shards=(1, self.shards), **kinds)
        self.down = weight((E, D, F), build.dtype, down_axes, **kinds)
        layout = {"gate_shards": (1, self.shards)}
        self.gate_up_bias = weight((E, 2 * F), jnp.float32, (expert, ffw), **layout) if bias else None
        self.down_bias = weight((E, D), jnp.float32, (expert, "embed")) if bias else None
        axis = build.rules.mesh_axis
        self.placement = (build.mesh, axis(expert), axis(ffw))
        self.gate_up_lora: AdapterStack | None = None  # see models/adapters/attach.py
        self.down_lora: AdapterStack | None = None

    def __call__(
        self, x_TD: jax.Array, ids_Tk: jax.Array, weights_Tk: jax.Array, adapter_T: jax.Array | None = None
    ) -> jax.Array:
        mesh, expert_axis, model_axis = self.placement
        lora = None
        if adapter_T is not None and self.gate_up_lora is not None and self.down_lora is not None:
            lora = ExpertAdapters(self.gate_up_lora.get_value(), self.down_lora.get_value(), adapter_T)
        return experts(
            x_TD,
            ids_Tk,
            weights_Tk,
            self.gate_up.get_value(),
            self.down.get_value(),
            self.hidden,
            gated=self.gated,
            gate_up_bias_EJ=None if self.gate_up_bias is None else self.gate_up_bias[...],
            down_bias_ED=None if self.down_bias is None else self.down_bias[...],
            mesh=mesh,
            expert_axis=expert_axis,
            model_axis=model_axis,
            lora=lora,
        )

    def hidden(self, gate_up_MJ: jax.Array) -> jax.Array:
        """act(gate) * up, on a device's piece of the rows: its gate first, then its up."""
        whole = self.placement[0] is None or self.placement[2] is None
        pieces = gate_up_MJ.reshape(gate_up_MJ.shape[0], self.shards if whole else 1, 2, -1)
        return self.gate(pieces[:, :, 0], pieces[:, :, 1]).reshape(gate_up_MJ.shape[0], -1)

    def gate(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        return activation(self.activation)(gate) * up

    def recipes(self, name: str, sources: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> Recipes:
        E, D, F = self.sizes
        gate, up, down = sources
        pairs = [[Piece(f"{name}.{e}.{part}.weight", (F, D)) for part in (gate, up)] for e in range(E)]
        downs = [Piece(f"{name}.{e}.{down}.weight", (D, F)) for e in range(E)]
        return {
            "gate_up": Stack(tuple(deal(self.shards, *pair) for pair in pairs)),
            "down": Stack(tuple(downs)),
        }


def choose(logits_TE: jax.Array, moe: MoEConfig, bias_E: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """(ids_Tk int32, weights_Tk float32): which experts each token visits, and how much each counts.

    Groups are DeepSeek-V2's (arXiv:2405.04434) and V3's (arXiv:2412.19437).
    """
    logits_TE = logits_TE.astype(jnp.float32)
    scores_TE = jax.nn.sigmoid(logits_TE) if moe.scoring == "sigmoid" else jax.nn.softmax(logits_TE)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if moe.groups > 1:
        grouped_TgE = choice_TE.reshape(-1, moe.groups, moe.num_experts // moe.groups)
        best = jax.lax.top_k(grouped_TgE, 2 if moe.group_score == "top2" else 1)[0].sum(-1)
        _, kept = jax.lax.top_k(best, moe.groups_kept)
        keep_Tg = jax.nn.one_hot(kept, moe.groups, dtype=bool).any(1)
        masked = jnp.where(keep_Tg[:, :, None], grouped_TgE, -jnp.inf)
        choice_TE = masked.reshape(choice_TE.shape)
    _, ids_Tk = jax.lax.top_k(choice_TE, moe.experts_per_token)
    weights_Tk = jnp.take_along_axis(scores_TE, ids_Tk, axis=-1)
    if moe.normalize:
        weights_Tk = weights_Tk / (weights_Tk.sum(-1, keepdims=True) + (1e-20 if moe.scoring == "sigmoid" else 0.0))
    return ids_Tk.astype(jnp.int32), weights_Tk * moe.scale


class MoE(nnx.Module):
    """Router, experts and shared expert, in the naming of Qwen and DeepSeek.

    Args:
        shared_name: of the shared expert in checkpoints.
    """

    def __init__(self, config: ModelConfig, build: Build, shared_name: str = "shared_expert"):
        assert config.moe is not None
        self.moe, self.shared_name = config.moe, shared_name
        self.router = Linear(config.embed_dim, config.moe.num_experts, build, (None, "embed"))
        self.bias = weight((config.moe.num_experts,), jnp.float32, (None,)) if config.moe.bias else None
        self.experts = self.make_experts(config, config.moe, build)
        shared = config.moe.shared_ffw_dim
        self.shared = GatedMLP(config, build, shared) if shared else None
        self.shared_gate = Linear(config.embed_dim, 1, build, (None, "embed")) if config.moe.shared_gate else None

    def make_experts(self, config: ModelConfig, moe: MoEConfig, build: Build) -> Any:
        return Experts(config, moe, build)

    def __call__(
        self, x_TD: jax.Array, step: Step, norm: Any = None, residual_TD: jax.Array | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """mixture(norm(x)) + residual, and the experts that each token visits."""
        x_TD = x_TD if norm is None else norm(x_TD)
        logits_TE = self.router(x_TD, out_dtype=jnp.float32, adapter_T=step.adapter_T)
        ids_Tk, weights_Tk = choose(logits_TE, self.moe, None if self.bias is None else self.bias[...])
        y_TD = self.experts(x_TD, ids_Tk, weights_Tk, step.adapter_T)
        if self.shared is not None:
            shared_TD, _ = self.shared(x_TD, step)
            if self.shared_gate is not None:
                shared_TD = shared_TD * jax.nn.sigmoid(self.shared_gate(x_TD, adapter_T=step.adapter_T))
            y_TD = y_TD + shared_TD
        return (y_TD if residual_TD is None else y_TD + residual_TD), (ids_Tk,)

    def recipes(self, name: str) -> Recipes:
        recipes = under("router", self.router.recipes(f"{name}.gate"))
        if self.bias is not None:
            recipes["bias"] = one(f"{name}.gate.e_score_correction_bias", *self.bias.shape)
        recipes |= under("experts", self.experts.recipes(f"{name}.experts"))
        if self.shared is not None:
            recipes |= under("shared", self.shared.recipes(f"{name}.{self.shared_name}"))
        if self.shared_gate is not None:
            recipes |= under("shared_gate", self.shared_gate.recipes(f"{name}.{self.shared_name}_gate"))
        return recipes
