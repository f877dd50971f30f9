"""A network with one adapter that everybody has, without an engine around it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from models.adapters.attach import attach
from models.adapters.read import read_adapter
from models.api import KVCache, Result, Step
from models.layers.linear import AdapterStack

SLOT = 2
"""Of three, of which the first is nobody's."""


class Beside(nnx.Module):
    """A model whose every token has an adapter.

    Args:
        model: filled, on one device; it gets room for adapters.
        folder: the adapter.
        checkpoint: of the model.
    """

    def __init__(self, model: Any, folder: Path, checkpoint: Any, max_rank: int = 8) -> None:
        self.model = model
        room = attach(model, slots=2, max_rank=max_rank, mesh=None)
        base = dataclasses.replace(room.base, read=checkpoint.read)
        packed = jnp.asarray(room.pack(read_adapter(folder, base)))
        modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
        for site, (a, b) in zip(room.sites, room.unpack(packed), strict=True):
            stack = getattr(modules[site.path], site.attribute).get_value()
            filled = dataclasses.replace(stack, a_NRI=stack.a_NRI.at[SLOT].set(a), b_NRO=stack.b_NRO.at[SLOT].set(b))
            setattr(modules[site.path], site.attribute, nnx.data(AdapterStack(filled)))

    def kv_specs(self) -> Any:
        return self.model.kv_specs()

    def state_specs(self) -> Any:
        return getattr(self.model, "state_specs", tuple)()

    def forward(self, step: Step, cache: KVCache) -> Result:
        own_T = jnp.full(step.tokens_T.shape, SLOT, jnp.int32)
        return self.model.forward(dataclasses.replace(step, adapter_T=own_T), cache)

    def logits(self, hidden_RD: Any) -> Any:
        return self.model.logits(hidden_RD, jnp.full(hidden_RD.shape[0], SLOT, jnp.int32))
