"""Products with a weight that is dense or quantized."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers.build import Build, weight
from models.layers.norms import Norm, taken
from models.recipes import Recipes, one
from ops.linear import linear
from ops.lora import Adapters


class AdapterStack(nnx.Variable):
    """The adapters' matrices for one weight, a `LoraStack`. No parameter: it comes from no checkpoint of the model."""


class Linear(nnx.Module):
    """y = x W^T + b. `weight` is dense [O, I] or a quantized pytree: `ops.linear` dispatches on its type."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        build: Build,
        axes: tuple[str | None, str | None],
        bias: bool = False,
        **metadata: Any,
    ):
        self.weight = weight((outputs, inputs), build.dtype, axes, **metadata)
        if metadata.get("spread") is not None and metadata["spread"].part == "out":
            metadata = {}  # its bias is of the rows, which no head owns
        self.bias = weight((outputs,), jnp.float32, axes[:1], **metadata) if bias else None
        self.lora: AdapterStack | None = None  # see models/adapters/attach.py

    def __call__(
        self,
        x_TI: jax.Array,
        out_dtype: Any = None,
        norm: Norm | None = None,
        residual_TO: jax.Array | None = None,
        adapter_T: jax.Array | None = None,
        activation: str | None = None,
    ) -> jax.Array:
        """act(norm(x) W^T + b) + residual; a kernel that can takes what stands around the product along with it.

        Args:
            adapter_T: `Step.adapter_T`, whose adapters change the product.
        """
        return linear(
            x_TI,
            self.weight.get_value(),
            self.bias_value(),
            norm=taken(norm),
            residual_TO=residual_TO,
            out_dtype=out_dtype,
            adapters=self.adapters(adapter_T),
            activation=activation,
        )

    def adapters(self, adapter_T: jax.Array | None) -> Adapters | None:
        """What changes its product for tokens with these adapters; None where nobody has one or there is no room for any."""
        return None if adapter_T is None or self.lora is None else Adapters(self.lora.get_value(), adapter_T)

    def bias_value(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[...]

    def recipes(self, name: str) -> Recipes:
        shape = self.weight.stored_shape
        recipes = {"weight": one(f"{name}.weight", *shape)}
        if self.bias is not None:
            recipes["bias"] = one(f"{name}.bias", shape[0])
        return recipes
