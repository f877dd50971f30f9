"""Products of Gemma 4's towers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from models.encoders.vit import VitConfig
from models.layers import Build, Linear, weight
from models.recipes import Recipes, Stack, one, under

BOUNDS = ("input_min", "input_max", "output_min", "output_max")


class Bounded(nnx.Module):
    """A product; in some checkpoints what enters it and what leaves it is kept within learned bounds."""

    def __init__(self, config: VitConfig, sizes: tuple[int, int], build: Build, axes: tuple[str | None, str | None]):
        self.product = Linear(*sizes, build, axes)
        self.bounds = weight((4,), jnp.float32, (None,)) if config.get("bounded") else None

    def __call__(self, x_PD: jax.Array) -> jax.Array:
        if self.bounds is None:
            return self.product(x_PD)
        low, high, least, most = self.bounds[...].astype(x_PD.dtype)
        return jnp.clip(self.product(jnp.clip(x_PD, low, high)), least, most)

    def recipes(self, name: str) -> Recipes:
        recipes = under("product", self.product.recipes(f"{name}.linear"))
        if self.bounds is not None:
            recipes["bounds"] = Stack(tuple(one(f"{name}.{bound}") for bound in BOUNDS))
        return recipes
