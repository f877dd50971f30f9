"""The frame that every decoder-only family shares: embed, layers, final norm, logits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from models import expert_loads
from models.api import KVCache, Result, StateSpec, Step
from models.config import ModelConfig
from models.kept import Cache, Kept
from models.layers import Build, Embedding, Layer, Linear, RMSNorm, child_recipes
from models.recipes import Recipes, under
from ops.paged_attention.batch import KVSpec


class Decoder(nnx.Module):
    """`models.api.CausalLM` over a list of layers; families differ in the layer they pass."""

    names: ClassVar[dict[str, str]] = {"embed": "model.embed_tokens", "norm": "model.norm"}
    layer_name = "model.layers"

    def __init__(
        self,
        config: ModelConfig,
        build: Build,
        layer: Callable[[ModelConfig, int, Build], Any] = Layer,
    ):
        self.config = config
        self.compute_dtype = build.compute_dtype
        self.embed = Embedding(config.vocab_size, config.embed_dim, build)
        self.layers: Any = nnx.List([layer(config, index, build) for index in range(config.num_layers)])
        self.kept = Kept.of(self.layers)
        self.norm = self.make_norm(config)
        axes = (build.axis("vocab", config.vocab_size), "embed")
        untied = not config.tie_embeddings
        self.head = Linear(config.embed_dim, config.vocab_size, build, axes) if untied else None

    def make_norm(self, config: ModelConfig) -> Any:
        return RMSNorm(config.embed_dim, config.norm_eps, config.norm_offset)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.kept.specs

    def state_specs(self) -> tuple[StateSpec, ...]:
        return self.kept.state_specs

    def forward(self, step: Step, cache: KVCache) -> Result:
        steps, ends, parts = step.by_group(), step.at_end(), Cache(self.kept, step.attention, cache)
        x_TD = self.embed_tokens(step)
        if (real_T := step.real()) is not None:  # kernels that multiply no rows of zeros then compute no padding
            x_TD = jnp.where(real_T[:, None], x_TD, 0)
        beside = self.beside(step, x_TD)
        entered, visited, handed = [], (), []
        for index, layer in enumerate(self.layers):
            entered.append(x_TD)
            group, kept = parts.of(index)
            its = (steps if index < self.kept.last else ends)[group]
            x_TD, kept, ids, *handed = run_layer(*nnx.split(layer), x_TD, its, kept, *beside[index], *handed)
            parts.put(index, kept)
            visited += ids if its.asked_T is None else expert_loads.of_asked(ids, its.asked_T)
            if step.embeddings is not None:
                x_TD = step.embeddings.added(x_TD, index)
        taps = tuple([*entered, x_TD][index] for index in step.taps)
        return Result(self.norm(x_TD), parts.whole(), taps, visited)

    def beside(self, step: Step, x_TD: jax.Array) -> Sequence[tuple[jax.Array, ...]]:
        """Of each layer, what it is given besides the residual stream."""
        return ((),) * len(self.layers)

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that a checkpoint may have in the network's layers without need."""
        return ()

    def embed_tokens(self, step: Step) -> jax.Array:
        """The residual stream's start, x_TD. Families with learned positions add them here."""
        x_TD = self.embed(step.tokens_T, self.compute_dtype, step.adapter_T)
        x_TD = x_TD if self.config.embed_scale == 1.0 else x_TD * self.config.embed_scale
        return x_TD if step.embeddings is None else step.embeddings.placed(x_TD)

    def logits(self, hidden_RD: jax.Array, adapter_R: jax.Array | None = None) -> jax.Array:
        if self.head is None:
            logits_RV = self.embed.logits(hidden_RD, adapter_R)
        else:
            logits_RV = self.head(hidden_RD, out_dtype=jnp.float32, adapter_T=adapter_R)
        if self.config.logits_scale != 1.0:
            logits_RV = logits_RV * self.config.logits_scale
        cap = self.config.logits_softcap
        return logits_RV if cap is None else cap * jnp.tanh(logits_RV / cap)

    def recipes(self) -> Recipes:
        """How every parameter is made, by its path."""
        recipes = child_recipes(self, self.names, "")
        if self.head is not None:
            recipes |= under("head", self.head.recipes("lm_head"))
        for index, layer in enumerate(self.layers):
            recipes |= under(f"layers.{index}", layer.recipes(f"{self.layer_name}.{index}"))
        return recipes


@functools.partial(jax.jit, static_argnums=0)
def run_layer(
    graphdef: Any, state: Any, x_TD: jax.Array, step: Step, kv: Any, *beside: jax.Array | None
) -> tuple[Any, ...]:
    """One layer as a function of its own: equal layers are traced once (30 layers: 1.0 s of lowering becomes 0.1).
    What a layer returns behind what all layers do is handed to the next one."""
    return nnx.merge(graphdef, state)(x_TD, step, kv, *beside)
