"""Weights in a few bits on GPUs and TPUs: integers of four or eight bits, or float8, with scales by groups of inputs.

What a checkpoint has in blocks (GGUF, AWQ, GPTQ, compressed-tensors, MXFP4, NVFP4, bitsandbytes) or in float8 with scales
(DeepSeek's blocks of 128 x 128, rows, tensors) keeps its own numbers; see `group_pack.py`. Activations stay as they are: a Pallas
body turns a tile of the weight into numbers of their dtype on the chip, so memory gives only what is stored. Under them, in plain
XLA, the weight is written out for each product: right, and slow.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Generator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ops.linear.kernels.coding import Coding, dense
from ops.linear.weights import xla
from ops.linear.weights.base import StoredWeight
from ops.linear.weights.rotation import rotate
from ops.per_device import per_device

PLATFORMS = ("gpu", "tpu")
"""Where such weights are made of what a scheme keeps or rounds; a CPU has blocks."""

BODIES = ("pallas_tpu", "pallas_gpu", "xla")
"""Of the product, best first."""

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("grouped_product_body", default=None)


@contextlib.contextmanager
def use_body(name: str | None) -> Generator[None]:
    """Within it products that are traced use only this body where it takes the weight; None chooses freely again."""
    if name is not None and name not in BODIES:
        raise ValueError(f"{name!r} is no body of a product with a weight in groups; there are {', '.join(BODIES)}.")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@dataclasses.dataclass(frozen=True)
class Place:
    """How a weight [..., O, I] is cut: the mesh and the axis that cuts each of its dimensions, None for whole ones."""

    mesh: Mesh
    axes: tuple[str | None, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scale", "offset", "order_I"],
    meta_fields=["coding", "platform", "rotated", "place", "outputs"],
)
@dataclasses.dataclass(frozen=True)
class GroupedWeight(StoredWeight):
    """A weight matrix [O, I], or a stack of them [E, O, I], in groups.

    Attributes:
        values: int8 [..., I / 2, O] of four bits each, or int8 or float8 [..., I, O].
        scale: float32 or bfloat16 [..., G, O].
        offset: the same, added to what a value and its scale give; None for none.
        order_I: int32, which input each value of a channel belongs to, where a checkpoint sorted them; None for the same one.
        coding: what values and scales stand for.
        platform: of the devices that it lies on: "gpu", "tpu" or "cpu".
        rotated: the values stand for `rotate` of the weight, so a product needs `rotate(x)`.
        place: how it is cut; None on one device.
        outputs: O, where the arrays have more channels than that, which are zeros; None where they have not.
    """

    values: jax.Array
    scale: jax.Array
    offset: jax.Array | None
    order_I: jax.Array | None
    coding: Coding
    platform: str
    rotated: bool = False
    place: Place | None = None
    outputs: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight; within a function that each device runs, of its own part."""
        *lead, O = self.values.shape
        return (*lead[:-1], self.outputs or O, self.scale.shape[-2] * self.coding.group)

    @property
    def dtype(self) -> jnp.dtype:
        """int8 or float8: how the weight is stored."""
        return self.values.dtype

    def product(self, x_TI: jax.Array) -> jax.Array:
        x_TI = self._inputs(x_TI)
        if self.place is None or set(self.place.axes) == {None}:
            return self._whole(x_TI)
        o_axis, i_axis = self.place.axes

        def on_device(x_TI: jax.Array, weight: GroupedWeight) -> jax.Array:
            part_TO = weight._whole(x_TI)
            return part_TO if i_axis is None else lax.psum(part_TO, i_axis)

        P = PartitionSpec
        specs = P(None, i_axis), self.specs(P(o_axis, i_axis))
        return per_device(on_device, self.place.mesh, in_specs=specs, out_specs=P(None, o_axis))(
            x_TI, dataclasses.replace(self, order_I=None)
        )

    def _inputs(self, x_TI: jax.Array) -> jax.Array:
        """Activations as the stored values meet them."""
        x_TI = rotate(x_TI) if self.rotated else x_TI
        return x_TI if self.order_I is None else x_TI[:, self.order_I]

    def _whole(self, x_TI: jax.Array) -> jax.Array:
        """The product of what one device has."""
        arrays, body = (self.values, self.scale, self.offset), self._body(x_TI.shape[1])
        if body == "xla":
            weight_IO = dense(*arrays, self.coding, x_TI.dtype)
            y_TO = jnp.dot(x_TI, weight_IO, precision=xla.exact(x_TI), preferred_element_type=jnp.float32)
            return self._of_outputs(y_TO)
        from ops.linear.kernels import pallas_gpu, pallas_tpu  # Pallas costs 0.2 s to import

        kernel, own = (pallas_tpu, "tpu") if body == "pallas_tpu" else (pallas_gpu, "gpu")
        return self._of_outputs(kernel.product(x_TI, *arrays, self.coding, interpret=self.platform != own))

    def _of_outputs(self, y: jax.Array) -> jax.Array:
        """Without the channels behind them."""
        return y if self.outputs is None else y[..., : self.outputs]

    def _body(self, inputs: int) -> str:
        wanted = _forced.get() or {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(self.platform, "xla")
        if wanted == "xla":
            return wanted
        from ops.linear.kernels import pallas_gpu, pallas_tpu

        kernel = pallas_tpu if wanted == "pallas_tpu" else pallas_gpu
        return wanted if kernel.supports(inputs, self.values.shape[-1], self.coding) else "xla"

    def rows(self, ids_T: jax.Array) -> jax.Array:
        picked = [
            None if array is None else jnp.take(array, ids_T.reshape(-1), axis=1, mode="fill", fill_value=0)
            for array in (self.values, self.scale, self.offset)
        ]
        values, scale, offset = picked
        assert values is not None and scale is not None
        rows_TI = self._in_place(dense(values, scale, offset, self.coding, jnp.float32).T)
        inside_T1 = ((ids_T >= 0) & (ids_T < self.shape[0])).reshape(-1, 1)
        return jnp.where(inside_T1, rows_TI, 0).reshape(*ids_T.shape, -1)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        whole = self._of_outputs(dense(self.values, self.scale, self.offset, self.coding, jnp.float32))
        return self._in_place(whole.swapaxes(-1, -2)).astype(dtype)

    def _in_place(self, rows: jax.Array) -> jax.Array:
        """Rows of values in the inputs' own order, and as they were before they were rotated."""
        rows = rows if self.order_I is None else rows[..., jnp.argsort(self.order_I)]
        return rotate(rows) if self.rotated else rows

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        x_MI = self._inputs(x_MI)
        dense_EIO = dense(self.values, self.scale, self.offset, self.coding, x_MI.dtype)
        return self._of_outputs(lax.ragged_dot(x_MI, dense_EIO, sizes_E, preferred_element_type=jnp.float32))

    def of_expert(self, expert: jax.Array, x_RI: jax.Array) -> jax.Array:
        own = [
            None if array is None else lax.dynamic_index_in_dim(array, expert, 0, keepdims=False)
            for array in (self.values, self.scale, self.offset)
        ]
        values, scale, offset = own
        assert values is not None and scale is not None
        return dataclasses.replace(self, values=values, scale=scale, offset=offset, place=None).product(x_RI)

    def specs(self, whole: PartitionSpec) -> Any:
        *lead, o_axis, i_axis = (*whole, *(None,) * (len(self.shape) - len(whole)))
        turned = PartitionSpec(*lead, i_axis, o_axis)
        return dataclasses.replace(
            self,
            values=turned,
            scale=turned,
            offset=None if self.offset is None else turned,
            order_I=None if self.order_I is None else PartitionSpec(),
        )
