"""Eyes and ears of one decoder, as one tower."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from models.recipes import Recipes, under


class Senses(nnx.Module):
    """`models.api.ImageEncoder` that also hears.

    Args:
        eyes, ears: two of them, whose embeddings are of one width.
    """

    def __init__(self, eyes: Any, ears: Any):
        self.config, self.eyes, self.ears = eyes.config, eyes, ears

    def encode(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        """Of an image."""
        return self.eyes.encode(patches_PX, place_P2, count)

    def hear(self, patches_PX: jax.Array, place_P2: jax.Array, count: jax.Array) -> jax.Array:
        """Of a sound, as `encode`."""
        return self.ears.encode(patches_PX, place_P2, count)

    @property
    def unused(self) -> tuple[str, ...]:
        """Regular expressions for tensors that are not read."""
        return (*getattr(self.eyes, "unused", ()), *getattr(self.ears, "unused", ()))

    def recipes(self) -> Recipes:
        return under("eyes", self.eyes.recipes()) | under("ears", self.ears.recipes())
