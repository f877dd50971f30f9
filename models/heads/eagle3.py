"""EAGLE-3 (Li et al. 2025, arXiv:2503.01840): one layer over the hidden states of three of the model's layers.

What is tapped is brought to the head's width by one projection. The layer's queries, keys and values read the embedding of a
token beside that, each through a norm; its residual stream is the hidden states alone. It has an output projection of its own,
often over the most frequent tokens only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import KVCache, Step
from models.config import ModelConfig, from_hf
from models.heads.head import Said
from models.kept import Cache, Kept
from models.layers import Build, Embedding, GatedMLP, Linear, RMSNorm, child_recipes, weight
from models.layers.attention import Attention
from models.recipes import Recipes, one
from ops.paged_attention.batch import KVSpec

UNLIKELY = -1e30
"""Logit of a token that the head has no row for."""


@dataclasses.dataclass(frozen=True)
class Eagle3Config:
    """Sizes and switches of one head.

    Attributes:
        decoder: of its layer, with the model's vocabulary.
        rows: of its output projection.
        taps: layers of the model whose input it hears.
        heard_dim: the model's width.
        mapped: rows stand for other tokens than those of their numbers; the checkpoint says for which.
        own_table: it has an embedding table of its own.
        normed_residual: the residual stream begins behind the norm of the hidden states.
        normed_heard: what is tapped goes through a norm first.
        normed_again: what stands for the model's hidden states is taken behind the last norm.
        layer: what the checkpoint calls the layer.
    """

    decoder: ModelConfig
    rows: int
    taps: tuple[int, ...]
    heard_dim: int
    mapped: bool
    own_table: bool
    normed_residual: bool = False
    normed_heard: bool = False
    normed_again: bool = False
    layer: str = "midlayer"

    @classmethod
    def read(cls, hf: Mapping[str, Any], model: ModelConfig, has: Mapping[str, bool]) -> Eagle3Config:
        """From a config.json, in EAGLE's own format or in that of speculators.

        Args:
            model: the one that it guesses for.
            has: which of "midlayer", "d2t" and "embed_tokens" are in the checkpoint.
        Raises:
            ValueError: a head for another model, or one that is made otherwise; naming what differs.
        """
        options = {**_object(hf, "eagle_config"), **hf}
        network = dict(_object(hf, "transformer_layer_config") or hf)
        network.setdefault("architectures", hf.get("architectures") or ["LlamaForCausalLMEagle3"])
        layers = network.setdefault("num_hidden_layers", 1)
        if layers != 1:
            raise ValueError(f"the head has {layers} layers; heads of one layer are served.")
        if options.get("use_aux_hidden_state", True) is False:
            raise ValueError("the head hears the last layer alone (use_aux_hidden_state is false): it is no EAGLE-3.")
        # Its own limit of positions is that of its training texts; beyond it a head goes on as well as it can.
        network["max_position_embeddings"] = max(model.max_positions, _whole(network, "max_position_embeddings") or 0)
        decoder = from_hf(network, qkv_bias=bool(network.get("attention_bias", False)))
        width = _whole(options, "target_hidden_size") or decoder.embed_dim
        if width != model.embed_dim:
            raise ValueError(f"the head is for hidden states of {width}, the model's are {model.embed_dim} wide.")
        if decoder.vocab_size != model.vocab_size:
            raise ValueError(
                f"the head is for a vocabulary of {decoder.vocab_size} tokens, the model has {model.vocab_size}."
            )
        if not has["embed_tokens"] and decoder.embed_dim != model.embed_dim:
            raise ValueError(
                f"the head is {decoder.embed_dim} wide and has no embed_tokens of its own; the model's table is "
                f"{model.embed_dim} wide."
            )
        n = model.num_layers
        taps = options.get("eagle_aux_hidden_state_layer_ids") or (2, n // 2, n - 3)
        if not isinstance(taps, list | tuple) or any(
            isinstance(tap, bool) or not isinstance(tap, int) or not 0 <= tap <= n for tap in taps
        ):
            raise ValueError(f"the head hears the layers {taps!r} of a model of {n}.")
        rows = _whole(options, "draft_vocab_size") or decoder.vocab_size
        if rows > decoder.vocab_size:
            raise ValueError(f"the head has {rows} rows of logits for a vocabulary of {decoder.vocab_size} tokens.")
        if rows != decoder.vocab_size and not has["d2t"]:
            raise ValueError(f"the head has {rows} rows of logits and no d2t that says of which tokens.")
        return cls(
            decoder,
            rows,
            tuple(taps),
            model.embed_dim * len(taps),
            has["d2t"],
            has["embed_tokens"],
            bool(options.get("norm_before_residual", False)),
            bool(options.get("norm_before_fc", False)),
            bool(options.get("norm_output", False)),
            "midlayer" if has["midlayer"] else "layers.0",
        )


def _object(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A part of a configuration; empty where it is left out."""
    value = given.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"the head's configuration has {name} = {value!r}; it must be an object.")
    return value  # pyright: ignore[reportUnknownVariableType] - an object of JSON has names for keys


def _whole(given: Mapping[str, Any], name: str) -> int | None:
    """A number of a configuration; None where it is left out."""
    value = given.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"the head's configuration has {name} = {value!r}; it must be a whole number from 1.")
    return value


class PairAttention(Attention):
    """Attention whose projections read twice the width that its result has."""

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, 0, build)
        self.qkv = Attention(dataclasses.replace(config, embed_dim=2 * config.embed_dim), 0, build).qkv


class Eagle3Layer(nnx.Module):
    """The head's layer: x + attn(norm(embedding), norm(x)), then x + mlp(norm(x))."""

    names: ClassVar[dict[str, str]] = {
        "embed_norm": "input_layernorm",
        "hidden_norm": "hidden_norm",
        "attn": "self_attn",
        "mlp_norm": "post_attention_layernorm",
        "mlp": "mlp",
    }

    def __init__(self, config: ModelConfig, build: Build, normed_residual: bool):
        self.normed_residual = normed_residual
        self.embed_norm, self.hidden_norm, self.mlp_norm = (
            RMSNorm(config.embed_dim, config.norm_eps) for _ in range(3)
        )
        self.attn = PairAttention(config, build)
        self.mlp = GatedMLP(config, build)

    def __call__(self, embed_TD: jax.Array, x_TD: jax.Array, step: Step, kv: Any) -> tuple[jax.Array, Any]:
        normed_TD = self.hidden_norm(x_TD).astype(embed_TD.dtype)
        residual_TD = normed_TD if self.normed_residual else x_TD
        both = jnp.concatenate([self.embed_norm(embed_TD), normed_TD], axis=-1)
        x_TD, kv = self.attn(both, step, kv, residual_TD=residual_TD)
        x_TD, _ = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, kv


class Eagle3Head(nnx.Module):
    """`models.heads.Head`."""

    def __init__(self, eagle: Eagle3Config, build: Build):
        config = eagle.decoder
        D = config.embed_dim
        self.eagle, self.config, self.compute_dtype = eagle, config, build.compute_dtype
        self.fc = Linear(eagle.heard_dim, D, build, (None, "embed"))
        if eagle.normed_heard:
            self.heard_norm = RMSNorm(eagle.heard_dim, config.norm_eps)
        if eagle.own_table:
            self.embed = Embedding(config.vocab_size, D, build)
        self.layers: Any = nnx.List([Eagle3Layer(config, build, eagle.normed_residual)])
        self.kept = Kept.of(self.layers)
        self.norm = RMSNorm(D, config.norm_eps)
        self.head = Linear(D, eagle.rows, build, (build.axis("vocab", eagle.rows), "embed"))
        if eagle.mapped:
            self.token_of_row = weight((eagle.rows,), jnp.int32, (None,))

    @property
    def taps(self) -> tuple[int, ...]:
        return self.eagle.taps

    @property
    def heard_dim(self) -> int:
        return self.eagle.heard_dim

    def share(self, model: Any) -> None:
        if not self.eagle.own_table:
            self.embed = model.embed

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.kept.specs

    def hear(self, heard_TH: jax.Array) -> jax.Array:
        return self.fc(self.heard_norm(heard_TH) if self.eagle.normed_heard else heard_TH)

    def forward(self, step: Step, cache: KVCache, hidden_TD: jax.Array) -> Said:
        embed_TD = self.embed(step.tokens_T, self.compute_dtype)
        steps, parts = step.by_group(), Cache(self.kept, step.attention, cache)
        group, kept = parts.of(0)
        x_TD, kept = self.layers[0](embed_TD, hidden_TD, steps[group], kept)
        parts.put(0, kept)
        normed_TD = self.norm(x_TD)
        return Said(normed_TD, normed_TD if self.eagle.normed_again else x_TD, parts.whole())

    def logits(self, hidden_RD: jax.Array) -> jax.Array:
        logits_RV = self.head(hidden_RD, out_dtype=jnp.float32)
        if not self.eagle.mapped:
            return logits_RV
        all_RV = jnp.full((len(hidden_RD), self.config.vocab_size), UNLIKELY, jnp.float32)
        return all_RV.at[:, self.token_of_row[...]].set(logits_RV)

    def recipes(self) -> Recipes:
        eagle = self.eagle
        children = {"fc": "fc", "norm": "norm", "head": "lm_head"}
        if eagle.normed_heard:
            children["heard_norm"] = "input_norm"
        if eagle.own_table:
            children["embed"] = "embed_tokens"
        recipes = child_recipes(self, children, "")
        if eagle.mapped:
            recipes["token_of_row"] = one("d2t", eagle.rows, assemble=_tokens_of)
        layer = child_recipes(self.layers[0], self.layers[0].names, eagle.layer)
        return recipes | {f"layers.0.{path}": recipe for path, recipe in layer.items()}


def _tokens_of(offset: np.ndarray) -> np.ndarray:
    """A row's token: its number, and so much more."""
    return (np.arange(len(offset)) + offset).astype(np.int32)
