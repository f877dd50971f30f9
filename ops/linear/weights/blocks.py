"""Weights in a few bits, as checkpoints store them: blocks of neighbouring inputs share a scale, and maybe an offset.

w = (value - zero) * scale + offset, where values are integers of 4, 6 or 8 bits or entries of a table of 16. Integers and scales
are those of the file, so nothing is rounded a second time. Each stretch of output channels may have a form of its own, as
projections of different types have that one product takes together. See `ops/native/blocks/blocks.h` for the layout.

The native kernels round activations to int8 with one scale for every 32 inputs of a row. Under them, in plain XLA, the weight is
dequantized for each product: right, and slow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ops import native
from ops.linear.weights import xla
from ops.linear.weights.base import Around, Experts, StoredWeight
from ops.linear.weights.dense import ragged_dot
from ops.linear.weights.native import ACTIVATIONS, eps, f32, gain
from ops.linear.weights.rotation import rotate
from ops.lora import Adapters

PANEL = 16  # output channels a panel, as in ops/native/blocks/blocks.h
PANELS = 4  # panels a group, whose lines take turns
LINE = 64  # bytes that a panel's values come in
STEP = 32  # inputs that share an activation scale
NEST = 256  # inputs that share what nested scales are multiplied with
CHUNK = 512  # inputs that lie together

TABLES = {
    "none": None,
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    "e2m1": (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),  # doubled
    "nf4": (
        -32767,
        -22812,
        -17205,
        -12940,
        -9320,
        -6054,
        -2983,
        0,
        2608,
        5273,
        8064,
        11072,
        14441,
        18435,
        23689,
        32767,
    ),
    "fp4": (0, 160, 20480, 30720, 10240, 15360, 5120, 7680, 0, -160, -20480, -30720, -10240, -15360, -5120, -7680),
}
"""What 4-bit values are entries of, by name, in the order of the kernels' numbers. The last two, bitsandbytes' whose largest entry
is 1, are of 16 bits: NF4 in 1 / 32767, which is finer than bfloat16, FP4 in 1 / 30720, which is exact."""

SCALES = {
    "none": 0, "float32": 4, "float16": 2, "bfloat16": 2, "power": 1, "nested_u8": 1, "nested_s8": 1, "zero_point": 1,
}  # fmt: skip
"""Bytes of one scale or offset, by its type, in the order of the kernels' numbers: `power` is an exponent of two; nested ones are
times a float16 that 256 inputs share; an offset that is a zero point means -scale * it, and a nested one is subtracted."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a stretch of channels is stored.

    Attributes:
        bits: room of a value: 4, 6 or 8.
        table: of TABLES; for four bits.
        zero: taken off each value, after the table: 0 or a power of two, which kernels shift by.
        block: inputs a scale: 16 to 512 and a power of two, or a multiple of 512.
        scale, offset: of SCALES.
        power: all scales times 2^power.
    """

    bits: int
    zero: int = 0
    block: int = 32
    scale: str = "float16"
    offset: str = "none"
    table: str = "none"
    power: int = 0

    def __post_init__(self) -> None:
        if not (self.block in (16, 32, 64, 128, 256, 512) or self.block % CHUNK == 0):
            raise ValueError(f"a scale for every {self.block} inputs has no packed form.")
        if self.zero & (self.zero - 1):
            raise ValueError(f"{self.zero} taken off each value has no packed form: it is no power of two.")

    @property
    def largest(self) -> int:
        """The largest value there can be."""
        entries = TABLES[self.table]
        if self.table in ("nf4", "fp4"):
            return 255  # of either of their two bytes
        return (1 << self.bits) - 1 if entries is None else max(entries) + self.zero

    def numbers(self) -> np.ndarray:
        """As the kernels read it: int32 [8]."""
        kinds = list(SCALES)
        fields = [self.bits, list(TABLES).index(self.table), self.zero, self.block]
        fields += [kinds.index(self.scale), kinds.index(self.offset), self.power, self.largest]
        return np.array(fields, np.int32)

    def chunk_parts(self, inputs: int) -> tuple[int, int, int, int, int]:
        """Where in a panel's head of a chunk offsets, nested scales and nested offsets begin, its bytes, and lines of values."""
        blocks, nests = -(-inputs // self.block), -(-inputs // NEST)
        offsets = blocks * PANEL * SCALES[self.scale]
        nested = offsets + blocks * PANEL * SCALES[self.offset]
        more = nested + (nests * PANEL * 2 if self.scale.startswith("nested") else 0)
        end = more + (nests * PANEL * 2 if self.offset.startswith("nested") else 0)
        return offsets, nested, more, -(-end // LINE) * LINE, inputs * self.bits // 32

    def panel_bytes(self, inputs: int) -> int:
        """Bytes of a panel."""
        parts = (self.chunk_parts(count) for _, count in chunks(inputs))
        return sum(head + lines * LINE for *_, head, lines in parts)


def chunks(inputs: int) -> Iterator[tuple[int, int]]:
    """(first input, inputs) of each chunk; inputs are padded to whole steps."""
    padded = -(-inputs // STEP) * STEP
    return ((first, min(CHUNK, padded - first)) for first in range(0, padded, CHUNK))


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Neighbouring panels of one form; `offset` is where their groups begin in the weight's bytes, a multiple of 64."""

    form: Form
    panels: int
    offset: int


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["bytes_N", "order_I"], meta_fields=["shape", "stretches", "rotated"]
)
@dataclasses.dataclass(frozen=True)
class BlockWeight(StoredWeight):
    """A weight matrix [O, I] in blocks.

    Attributes:
        bytes_N: uint8, the groups of all panels.
        shape: (O, I), as of the dense weight; of a stack of experts (E O, I).
        stretches: in the channels' order, covering all panels.
        rotated: the values stand for `rotate` of the weight, so a product needs `rotate(x)`.
        order_I: int32, which input each value of a row belongs to, where a checkpoint sorted them; None for the same one.
    """

    bytes_N: jax.Array
    shape: tuple[int, int]
    stretches: tuple[Stretch, ...]
    rotated: bool = False
    order_I: jax.Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """uint8: how the weight is stored."""
        return self.bytes_N.dtype

    @property
    def forms(self) -> tuple[Form, ...]:
        """The different ones, in the order in which they first occur."""
        return tuple(dict.fromkeys(stretch.form for stretch in self.stretches))

    def description(self) -> np.ndarray:
        """What the kernels are told of it, int32; see `Weight::read` in ops/native/blocks/weight.h."""
        forms, first, places = self.forms, 0, []
        for stretch in self.stretches:
            places.append([forms.index(stretch.form), first, stretch.panels, stretch.offset // 64])
            first += stretch.panels
        head = np.array([self.rotated, len(forms), len(places)], np.int32)
        return np.concatenate([head, *(form.numbers() for form in forms), np.array(places, np.int32).reshape(-1)])

    def product(self, x_TI: jax.Array) -> jax.Array:
        """Rounds activations on a CPU with native kernels; elsewhere it dequantizes the weight."""

        def cpu(x_TI: jax.Array) -> jax.Array:
            return self._native(x_TI, Around()) if native.available() else self._plain(x_TI)

        return lax.platform_dependent(x_TI, cpu=cpu, default=self._plain)

    def _plain(self, x_TI: jax.Array) -> jax.Array:
        return xla.dense(x_TI.astype(jnp.float32), self.dequantize())

    def linear(self, x_TI: jax.Array, around: Around, dtype: jax.typing.DTypeLike) -> jax.Array:
        if not on_native():
            return super().linear(x_TI, around, dtype)
        return self._native(x_TI, around).astype(dtype)

    def _native(self, x_TI: jax.Array, around: Around) -> jax.Array:
        out = jax.ShapeDtypeStruct((x_TI.shape[0], self.shape[0]), jnp.float32)
        return jax.ffi.ffi_call(native.target("jaxserve_blocks_linear"), out)(
            *self._inputs(x_TI, around),
            *self._operands(around.bias_O),
            f32(around.residual_TO),
            eps=eps(around.norm),
        )

    def _inputs(self, x_TI: jax.Array, around: Around) -> tuple[jax.Array, jax.Array]:
        """Activations and the norm's gain in the order of the stored inputs."""
        x_TI, gain_I = f32(x_TI), gain(around.norm)
        if self.order_I is None:
            return x_TI, gain_I
        return x_TI[:, self.order_I], gain_I[self.order_I] if gain_I.size else gain_I

    def gated_mlp(
        self,
        x_TD: jax.Array,
        down: StoredWeight,
        activation: str,
        around: Around,
        down_bias_D: jax.Array | None,
        down_adapters: Adapters | None = None,
    ) -> jax.Array | None:
        # Gate and up must be whole panels each; the hidden values never leave the cache.
        if not isinstance(down, BlockWeight) or activation not in ACTIVATIONS or self.shape[0] % (2 * PANEL):
            return None
        if down.order_I is not None:  # hidden values are written where the gates are
            return None
        if not on_native() or around.adapters is not None or down_adapters is not None:
            return None
        out = jax.ShapeDtypeStruct((x_TD.shape[0], down.shape[0]), jnp.float32)
        return jax.ffi.ffi_call(native.target("jaxserve_blocks_gated_mlp"), out)(
            *self._inputs(x_TD, around),
            *self._operands(around.bias_O),
            *down._operands(down_bias_D),
            f32(around.residual_TO),
            eps=eps(around.norm),
            activation=np.int64(ACTIVATIONS[activation]),
            width=np.int64(self.shape[0] // 2),
        )

    def experts(self, down: StoredWeight, given: Experts) -> jax.Array | None:
        if not isinstance(down, BlockWeight) or self.order_I is not None or down.order_I is not None or not on_native():
            return None
        if down.shape[1] % PANEL:  # gates and ups of an expert would share panels
            return None
        x_TD = given.x_TD
        out = jax.ShapeDtypeStruct(x_TD.shape, jnp.float32)
        y_TD = jax.ffi.ffi_call(native.target("jaxserve_blocks_experts"), out)(
            x_TD.astype(jnp.float32),
            given.ids_Tk.astype(jnp.int32),
            given.weights_Tk.astype(jnp.float32),
            *self._operands(given.gate_up_bias_EJ),
            *down._operands(given.down_bias_ED),
            num_experts=np.int64(down.shape[0] // x_TD.shape[1]),
            width=np.int64(down.shape[1]),
            activation=np.int64(ACTIVATIONS[given.gated]),
        )
        return y_TD.astype(x_TD.dtype)

    # Of a stack [E O, I], for experts whose hidden values, or adapters, are computed around the products:

    def has_grouped_kernel(self) -> bool:
        return self.order_I is None and on_native()

    def grouped_on_cpu(self, x_MI: jax.Array, sizes_E: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((x_MI.shape[0], self.shape[0] // sizes_E.shape[0]), jnp.float32)
        call = jax.ffi.ffi_call(native.target("jaxserve_blocks_grouped"), out)
        return call(f32(x_MI), sizes_E.astype(jnp.int32), *self._operands(None)[:2])

    def grouped(self, x_MI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
        dense_EOI = self.dequantize().reshape(sizes_E.shape[0], -1, self.shape[1])
        return ragged_dot(x_MI.astype(jnp.float32), dense_EOI, sizes_E)

    def rows(self, ids_T: jax.Array) -> jax.Array:
        def cpu(ids_T: jax.Array) -> jax.Array:
            return self._native_rows(ids_T) if native.available() else self._plain_rows(ids_T)

        return lax.platform_dependent(ids_T, cpu=cpu, default=self._plain_rows)

    def _native_rows(self, ids_T: jax.Array) -> jax.Array:
        out = jax.ShapeDtypeStruct((ids_T.size, self.shape[1]), jnp.float32)
        call = jax.ffi.ffi_call(native.target("jaxserve_blocks_rows"), out)
        rows_TI = call(ids_T.astype(jnp.int32).reshape(-1), *self._operands(None)[:2], outputs=np.int64(self.shape[0]))
        return self._in_place(rows_TI).reshape(*ids_T.shape, -1)

    def _in_place(self, array_RI: jax.Array) -> jax.Array:
        """Rows of values in the inputs' own order."""
        return array_RI if self.order_I is None else array_RI[:, jnp.argsort(self.order_I)]

    def _plain_rows(self, ids_T: jax.Array) -> jax.Array:
        return jnp.take(self.dequantize(), ids_T, axis=0, mode="fill", fill_value=0)

    def dequantize(self, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
        O, I = self.shape
        parts = []
        for stretch in self.stretches:
            size, begin = stretch.form.panel_bytes(I), stretch.offset
            whole, rest = stretch.panels // PANELS, stretch.panels % PANELS
            for groups, of in ((whole, PANELS), (1, rest)):
                if groups * of:
                    end = begin + groups * of * size
                    bytes_GN = lax.slice(self.bytes_N, (begin,), (end,)).reshape(groups, of * size)
                    parts.append(_dense_groups(bytes_GN, of, stretch.form, I))
                    begin = end
        dense_OI = self._in_place(jnp.concatenate(parts)[:O] if len(parts) > 1 else parts[0][:O])
        return (rotate(dense_OI) if self.rotated else dense_OI).astype(dtype)

    def _operands(self, bias_O: jax.Array | None) -> tuple[jax.Array, ...]:
        return self.bytes_N, jnp.asarray(self.description()), f32(None if bias_O is None else bias_O.reshape(-1))


def on_native() -> bool:
    """Whether products are the native kernels' here: the default device is a CPU that has them."""
    return jax.default_backend() == "cpu" and native.available()


def _dense_groups(bytes_GN: jax.Array, of: int, form: Form, inputs: int) -> jax.Array:
    """Float32 [G * of * 16, inputs] of groups of `of` panels each."""
    codes_PcI, scale_PcB, offset_PcB = parts_of_groups(bytes_GN, of, form, inputs)
    entries = TABLES[form.table]
    values_PcI = codes_PcI if entries is None else jnp.asarray(np.array(entries, np.int32) + form.zero)[codes_PcI]
    dense_PcI = (values_PcI.astype(jnp.float32) - form.zero) * _spread(scale_PcB, form, inputs)
    if form.offset != "none":
        dense_PcI = dense_PcI + _spread(offset_PcB, form, inputs)
    return dense_PcI.reshape(-1, inputs)


def _spread(numbers_PcB: jax.Array, form: Form, inputs: int) -> jax.Array:
    """Each block's number for each of its inputs."""
    return jnp.repeat(numbers_PcB, min(form.block, CHUNK), axis=-1)[..., :inputs]


def parts_of_groups(bytes_GN: Any, of: int, form: Form, inputs: int) -> tuple[Any, Any, Any]:
    """What groups of `of` panels each hold, of numpy's or JAX's arrays, like those that are given.

    Returns:
        (codes uint8 [G * of, 16, inputs]; scales float32 [G * of, 16, blocks], of CHUNK inputs at most; offsets, which are added to
        a value times its scale, the same, of no blocks where the form has none).
    """
    P, begin, parts, np_like = bytes_GN.shape[0] * of, 0, [], jnp if isinstance(bytes_GN, jax.Array) else np
    for _, count in chunks(inputs):
        offsets, nested, more, head, lines = form.chunk_parts(count)
        head_PN = bytes_GN[:, begin : begin + of * head].reshape(P, head)
        begin += of * head
        lines_GLp = bytes_GN[:, begin : begin + of * lines * LINE].reshape(-1, lines, of, PANEL, 4)
        begin += of * lines * LINE
        codes_PcI = _codes(np_like, lines_GLp.swapaxes(1, 2).reshape(P, lines, PANEL, 4), form.bits, count)
        scale_PcB = _numbers(np_like, form.scale, head_PN[:, :offsets], head_PN[:, nested:more], form.block, count)
        offset_PcB = _numbers(np_like, form.offset, head_PN[:, offsets:nested], head_PN[:, more:], form.block, count)
        parts.append((codes_PcI, scale_PcB, offset_PcB))
    codes_PcI, scale_PcB, offset_PcB = (np_like.concatenate(list(part), axis=-1) for part in zip(*parts, strict=True))
    scale_PcB = scale_PcB * np.float32(2.0**form.power)
    offset_PcB = offset_PcB * scale_PcB if form.offset == "zero_point" else offset_PcB
    return codes_PcI[..., :inputs], scale_PcB, -offset_PcB if form.offset in ("zero_point", "nested_u8") else offset_PcB


def _codes(np_like: Any, lines_PLc4: Any, bits: int, inputs: int) -> Any:
    """uint8 [P, 16, inputs], before the table."""
    P = lines_PLc4.shape[0]
    if bits == 8:
        quads = lines_PLc4
    elif bits == 4:
        quads = np_like.stack([lines_PLc4 & 15, lines_PLc4 >> 4], axis=2).reshape(P, inputs // 4, PANEL, 4)
    else:
        three = lines_PLc4.reshape(P, inputs // 16, 3, PANEL, 4)
        fourth = (three[:, :, 0] >> 6) | (three[:, :, 1] >> 6) << 2 | (three[:, :, 2] >> 6) << 4
        quads = np_like.concatenate([three & 63, fourth[:, :, None]], axis=2).reshape(P, inputs // 4, PANEL, 4)
    return quads.swapaxes(1, 2).reshape(P, PANEL, inputs)


def _numbers(np_like: Any, kind: str, bytes_PN: Any, nested_PN: Any, block: int, inputs: int) -> Any:
    """Float32 [P, 16, blocks], unsigned."""
    P, size = bytes_PN.shape[0], SCALES[kind]
    if not size:
        return np_like.zeros((P, PANEL, 0), np.float32)
    whole = np_like.ascontiguousarray(bytes_PN) if np_like is np else bytes_PN
    if size > 1:
        wide = whole.view(jnp.dtype(kind)).reshape(P, -1, PANEL).astype(np.float32)
    elif kind == "power":
        wide = (whole.reshape(P, -1, PANEL).astype(np.uint32) << 23).view(np.float32)
    else:
        wide = whole.view(np.int8 if kind == "nested_s8" else np.uint8).reshape(P, -1, PANEL).astype(np.float32)
    if kind.startswith("nested"):
        nests_PN = nested_PN[:, : -(-inputs // NEST) * PANEL * 2]
        nests_PN = np_like.ascontiguousarray(nests_PN) if np_like is np else nests_PN
        halves = nests_PN.view(np.float16).reshape(P, -1, PANEL).astype(np.float32)
        wide = wide * np_like.repeat(halves, NEST // min(block, NEST), axis=1)[:, : wide.shape[1]]
    return wide.swapaxes(1, 2)
