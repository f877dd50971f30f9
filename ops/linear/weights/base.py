"""What every type of weight does by itself, so that nobody else asks how one is stored."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import PartitionSpec

from ops.lora import Adapters, LoraStack
from ops.norm import TakenNorm


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands around a product, y = act(norm(x) W^T + bias) + residual; None where it is absent.

    Attributes:
        bias_O: added in float32.
        norm: applied to x first; one that takes the mean off is only given to a weight that `centres`.
        residual_TO: added to the result, in the result's dtype.
        adapters: change the product; only given to a weight that `takes` them.
        activation: by the names of `ops.activation`; only given to a weight that `activates` so.
    """

    bias_O: jax.Array | None = None
    norm: TakenNorm | None = None
    residual_TO: jax.Array | None = None
    adapters: Adapters | None = None
    activation: str | None = None


@dataclasses.dataclass(frozen=True)
class Experts:
    """The operands of a mixture of experts, as `ops.experts.experts` takes them, for weights that compute all of it."""

    x_TD: jax.Array
    ids_Tk: jax.Array
    weights_Tk: jax.Array
    gated: str
    gate_up_bias_EJ: jax.Array | None
    down_bias_ED: jax.Array | None


class StoredWeight(abc.ABC):
    """A weight matrix [O, I], or a stack of them [E, O, I], in some way of storing it; a pytree.

    A subclass gives the plain product; what it can do faster it overrides. Fused calls return None where this weight, or the
    other one, is not stored so that a kernel could take both.
    """

    shape: Any
    """Of the dense weight."""

    dtype: Any
    """How it is stored."""

    centres: ClassVar[bool] = False
    """Whether its calls take a `CentredNorm` along."""

    @abc.abstractmethod
    def product(self, x_TI: jax.Array) -> jax.Array:
        """y_TO = x W^T in float32, of float activations."""

    @abc.abstractmethod
    def rows(self, ids_T: jax.Array) -> jax.Array:
        """The rows of the given ids [..., I], float32 or as they are stored; zeros for ids outside [0, O)."""

    @abc.abstractmethod
    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        """The dense weight that it stands for."""

    def linear(self, x_TI: jax.Array, around: Around, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The product and what stands around it, in `dtype`."""
        if around.norm is not None:
            x_TI = around.norm(x_TI)
        y_TO = self.product(x_TI)
        if around.bias_O is not None:
            y_TO = y_TO + around.bias_O.astype(jnp.float32)
        y_TO = y_TO.astype(dtype)
        return y_TO if around.residual_TO is None else around.residual_TO.astype(dtype) + y_TO

    def takes(self, stack: LoraStack) -> bool:
        """Whether `linear` takes adapters along; they are added to what it gives where it does not."""
        return False

    def activates(self, activation: str) -> bool:
        """Whether `linear` takes such an activation along."""
        return False

    def mlp(
        self, x_TD: jax.Array, down: StoredWeight, activation: str, around: Around, down_bias_D: jax.Array | None
    ) -> jax.Array | None:
        """A whole block without gates in one call, float32. `around` holds its bias and norm, and the block's residual."""
        return None

    def gated_mlp(
        self,
        x_TD: jax.Array,
        down: StoredWeight,
        activation: str,
        around: Around,
        down_bias_D: jax.Array | None,
        down_adapters: Adapters | None = None,
    ) -> jax.Array | None:
        """A whole gated block in one call, float32; its rows are gate, then up. `around` holds this product's bias, norm and
        adapters and the block's residual."""
        return None

    def experts(self, down: StoredWeight, given: Experts) -> jax.Array | None:
        """All chosen experts in one call, in x's dtype; this weight is gate and up of all."""
        return None

    # Of stacks [E, O, I]:

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        """y_MO float32 of rows sorted by expert, `sizes_E` of each; rows behind the last group come out as anything."""
        raise NotImplementedError(f"{type(self).__name__} is no stack of experts.")

    def has_grouped_kernel(self) -> bool:
        """Whether this machine's CPU has a kernel for `grouped`. On other platforms nothing is built to find out."""
        return False

    def grouped_on_cpu(self, x_MI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        """`grouped` by that kernel; zeros behind the last group."""
        raise NotImplementedError(f"{type(self).__name__} has no kernel for stacks of experts.")

    def of_expert(self, expert: jax.Array, x_RI: jax.Array) -> jax.Array:
        """y_RO float32 of rows that all go through one expert."""
        raise NotImplementedError(f"{type(self).__name__} is no stack of experts.")

    def specs(self, whole: PartitionSpec) -> Any:
        """The partition specs of its arrays, in its own structure, where the dense weight's is `whole`."""
        raise NotImplementedError(f"{type(self).__name__} lies on one device.")

    def form(self) -> str:
        """What programs that multiply with it are compiled for besides its arrays' content: of two weights of the same form either
        may take the other's place."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # pyright: ignore[reportArgumentType]
        arrays = {
            name: (tuple(value.shape), str(value.dtype)) for name, value in fields.items() if hasattr(value, "ndim")
        }
        return f"{type(self).__name__}{fields | arrays}"

    def packed(self) -> StoredWeight:
        """The same weight in the layout of this machine's fastest product; itself where there is no other."""
        return self

    def packed_experts(self) -> StoredWeight:
        """A stack of experts in the layout of this machine's fastest kernel for them; itself where there is no other."""
        return self


def single_cpu(array: jax.Array) -> bool:
    """Whether an array lies on one CPU device, so that native kernels may be asked; False while tracing."""
    if isinstance(array, Tracer):
        return False
    devices = array.devices()
    return len(devices) == 1 and next(iter(devices)).platform == "cpu"
