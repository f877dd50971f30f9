"""Feed-forward experts that touch only the weights of the experts that were chosen.

Assignments (token, expert) are sorted by expert, so each expert's rows are neighbours. Accelerators multiply them by
`jax.lax.ragged_dot_general`. XLA's CPU backend expands that to a product with every expert (16 experts of 512 x 1024,
one token: 238 ms); there a native kernel reads the chosen experts' matrices where they lie (ops/native/grouped_dot.cc). Without
it, blocks of rows go through their expert one after the other, in a loop whose trip count the routing decides, which copies
each block's matrices.

In int8 (`quantize`, `pack`) one native call does all of it on CPU: see ops/native/int8_experts.cc.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ops import native
from ops.linear import native as linear_native
from ops.linear.weights import PANEL, Int8Weight, PackedInt8Weight, Weight, pack, quantize_rows, rotate
from ops.per_device import per_device

Activation = Callable[[jax.Array], jax.Array]
"""Product with gate and up, [M, J], in -> hidden [M, F] out."""

_ROWS_BY_EXPERT = lax.RaggedDotDimensionNumbers((([1], [2]), ([], [])), [0], [0])


def experts(
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up_EJD: Weight,
    down_EDF: Weight,
    activation: Activation,
    *,
    gated: str | None = None,
    gate_up_bias_EJ: jax.Array | None = None,
    down_bias_ED: jax.Array | None = None,
    mesh: Mesh | None = None,
    expert_axis: str | None = None,
    model_axis: str | None = None,
) -> jax.Array:
    """y_TD: the weighted sum over each token's k experts of down_e(activation(gate_up_e x + bias)) + bias.

    Args:
        x_TD: activations.
        ids_Tk: int32 expert ids in [0, E).
        weights_Tk: float32 weights of the experts' results.
        gate_up_EJD, down_EDF: one matrix an expert, `[out, in]`; J is usually 2 F. Dense, or quantized by
            `ops.linear.quantize`, or what `pack` made of that.
        activation: applied to [M, J], elementwise over M; sees each device's piece of J when that is sharded.
        gated: the name of an activation of ops.activation, where `activation` is that of the first half of J times the
            second half; packed weights need it.
        gate_up_bias_EJ, down_bias_ED: added where given.
        mesh, expert_axis, model_axis: mesh axes that split E, and J with F; None where they are whole.
    Returns:
        [T, D] in x's dtype; products are accumulated in float32.
    """
    gate_up_bias_EJ = None if gate_up_bias_EJ is None else jnp.asarray(gate_up_bias_EJ)
    down_bias_ED = None if down_bias_ED is None else jnp.asarray(down_bias_ED)
    if isinstance(gate_up_EJD, PackedInt8Weight) and isinstance(down_EDF, PackedInt8Weight):
        assert gated is not None
        return _packed(x_TD, ids_Tk, weights_Tk, gate_up_EJD, down_EDF, gated, gate_up_bias_EJ, down_bias_ED)
    assert not isinstance(gate_up_EJD, PackedInt8Weight)
    assert not isinstance(down_EDF, PackedInt8Weight)
    if mesh is None or (expert_axis is None and model_axis is None):
        return _local(x_TD, ids_Tk, weights_Tk, gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED, activation)
    axes = tuple(axis for axis in (expert_axis, model_axis) if axis is not None)

    def on_device(x_TD, ids_Tk, weights_Tk, gate_up, down, gate_up_bias, down_bias):
        first = 0 if expert_axis is None else lax.axis_index(expert_axis) * gate_up.shape[0]
        if down_bias is not None and model_axis is not None:
            # Every device of the model axis adds its part of the product: only one may add the bias.
            down_bias = jnp.where(lax.axis_index(model_axis) == 0, down_bias, 0)
        here = (ids_Tk >= first) & (ids_Tk < first + gate_up.shape[0])
        # Experts of other devices: id E sorts last and belongs to no group.
        ids_Tk = jnp.where(here, ids_Tk - first, gate_up.shape[0])
        y_TD = _local(x_TD, ids_Tk, weights_Tk, gate_up, down, gate_up_bias, down_bias, activation)
        return lax.psum(y_TD, axes)

    P = PartitionSpec
    up, down = P(expert_axis, model_axis), P(expert_axis, None, model_axis)
    up_spec = _specs(gate_up_EJD, up, up)
    down_spec = _specs(down_EDF, down, P(expert_axis))
    return per_device(
        on_device,
        mesh,
        in_specs=(P(), P(), P(), up_spec, down_spec, up, P(expert_axis)),
        out_specs=P(),
    )(x_TD, ids_Tk, weights_Tk, gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED)


def _specs(weight: jax.Array | Int8Weight, values: PartitionSpec, scale: PartitionSpec) -> Any:
    """The partition specs of a weight, in its own structure."""
    return dataclasses.replace(weight, values_OI=values, scale_O=scale) if isinstance(weight, Int8Weight) else values


def can_pack(shape_EOI: tuple[int, ...], gated: str | None) -> bool:
    """Whether `pack` can lay out experts of this shape and activation: whole panels each, and an activation that the
    kernel has."""
    return gated in linear_native.ACTIVATIONS and shape_EOI[1] % PANEL == 0


def pack_experts(weight: Weight) -> Weight:
    """Quantized experts in the layout of this machine's fastest kernel; unchanged where there is no other.

    Args:
        weight: [E, O, I], of which `can_pack` is true.
    Returns:
        one PackedInt8Weight [E * O, I], where `ops.linear.pack` makes one.
    """
    if not isinstance(weight, Int8Weight):
        return weight
    E, O, I = weight.values_OI.shape
    flat = Int8Weight(weight.values_OI.reshape(E * O, I), weight.scale_O.reshape(E * O), weight.rotated)
    packed = pack(flat)
    return packed if isinstance(packed, PackedInt8Weight) else weight


def _packed(x_TD, ids_Tk, weights_Tk, gate_up, down, gated, gate_up_bias_EJ, down_bias_ED):
    call = jax.ffi.ffi_call(
        native.target("jaxserve_int8_experts"), jax.ShapeDtypeStruct((x_TD.shape[0], x_TD.shape[1]), jnp.float32)
    )

    def operands(weight: PackedInt8Weight, bias: jax.Array | None) -> tuple[jax.Array, ...]:
        flat = jnp.zeros((0,), jnp.float32) if bias is None else bias.astype(jnp.float32).reshape(-1)
        return weight.panels_PQci, weight.scale_O, weight.sums_PGc, flat

    y_TD = call(
        x_TD.astype(jnp.float32),
        ids_Tk.astype(jnp.int32),
        weights_Tk.astype(jnp.float32),
        *operands(gate_up, gate_up_bias_EJ),
        *operands(down, down_bias_ED),
        num_experts=np.int64(down.shape[0] // x_TD.shape[1]),
        activation=np.int64(linear_native.ACTIVATIONS[gated]),
        up_rotated=np.int64(gate_up.rotated),
        down_rotated=np.int64(down.rotated),
    )
    return y_TD.astype(x_TD.dtype)


def _local(x_TD, ids_Tk, weights_Tk, gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED, activation):
    """On one device; an id of E (or more) is nobody's and yields zeros."""
    (T, k), E = ids_Tk.shape, gate_up_EJD.shape[0]
    ids_M = ids_Tk.reshape(-1)
    order_M = jnp.argsort(ids_M, stable=True)
    sorted_M = ids_M[order_M]
    sizes_E = jnp.zeros(E, jnp.int32).at[ids_M].add(1, mode="drop")
    rows_MD = x_TD[order_M // k]
    weights = (gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED)

    def ragged(rows_MD, dot=_ragged_dot):
        hidden_MJ = dot(rows_MD, gate_up_EJD, sizes_E, sorted_M)
        if gate_up_bias_EJ is not None:
            hidden_MJ = hidden_MJ + gate_up_bias_EJ[jnp.minimum(sorted_M, E - 1)]
        y_MD = dot(activation(hidden_MJ).astype(x_TD.dtype), down_EDF, sizes_E, sorted_M)
        return y_MD if down_bias_ED is None else y_MD + down_bias_ED[jnp.minimum(sorted_M, E - 1)]

    def cpu(rows_MD):
        if has_native_dot(gate_up_EJD) and has_native_dot(down_EDF):
            return ragged(rows_MD, _native_dot)
        return _blocks(rows_MD, sizes_E, *weights, activation)

    y_MD = lax.platform_dependent(rows_MD, cpu=cpu, default=ragged)
    # Rows beyond the groups hold anything.
    y_MD = jnp.where((sorted_M < E)[:, None], y_MD, 0.0)
    y_TkD = y_MD[jnp.argsort(order_M)].reshape(T, k, -1)
    return jnp.einsum("tkd,tk->td", y_TkD, weights_Tk.astype(jnp.float32)).astype(x_TD.dtype)


def _ragged_dot(
    x_MI: jax.Array, weight_EOI: jax.Array | Int8Weight, sizes_E: jax.Array, expert_M: jax.Array
) -> jax.Array:
    if isinstance(weight_EOI, Int8Weight) and weight_EOI.rotated:
        x_MI = rotate(x_MI)
    matrices = weight_EOI.values_OI.astype(x_MI.dtype) if isinstance(weight_EOI, Int8Weight) else weight_EOI
    y_MO = lax.ragged_dot_general(
        x_MI.astype(matrices.dtype), matrices, sizes_E, _ROWS_BY_EXPERT, preferred_element_type=jnp.float32
    )
    if isinstance(weight_EOI, Int8Weight):
        y_MO = y_MO * weight_EOI.scale_O[jnp.minimum(expert_M, matrices.shape[0] - 1)]
    return y_MO


_NATIVE_DOTS = {
    jnp.dtype(jnp.float32): "jaxserve_grouped_dot_f32",
    jnp.dtype(jnp.bfloat16): "jaxserve_grouped_dot_bf16",
}


def has_native_dot(weight_EOI: Weight) -> bool:
    """Whether this machine's CPU has a kernel for it. On other platforms nothing is built to find out."""
    dense = not isinstance(weight_EOI, Int8Weight | PackedInt8Weight)
    return dense and weight_EOI.dtype in _NATIVE_DOTS and jax.default_backend() == "cpu" and native.available()


def _native_dot(x_MI: jax.Array, weight_EOI: jax.Array, sizes_E: jax.Array, expert_M: jax.Array) -> jax.Array:
    """y_MO float32; zeros behind the last group."""
    del expert_M
    out = jax.ShapeDtypeStruct((x_MI.shape[0], weight_EOI.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call(native.target(_NATIVE_DOTS[jnp.dtype(weight_EOI.dtype)]), out)
    return call(x_MI.astype(jnp.float32), sizes_E, weight_EOI)


def block_rows(num_rows: int, num_experts: int, dtype: jax.typing.DTypeLike) -> int:
    """Rows that go through an expert at once on CPU.

    One at a time while most experts have one or two (a float32 matrix-vector product runs at the memory's speed; in
    bfloat16 it needs a second row to leave the slow path), else about what an expert has.
    """
    if num_rows <= 2 * num_experts:
        return 1 if jnp.dtype(dtype) == jnp.float32 else 2
    return min(64, max(8, 1 << (num_rows // num_experts - 1).bit_length()))


def _blocks(rows_MD, sizes_E, gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED, activation):
    (M, D), E = rows_MD.shape, gate_up_EJD.shape[0]
    size = block_rows(M, E, gate_up_EJD.dtype)
    padded = jnp.concatenate([rows_MD, jnp.zeros((size, D), rows_MD.dtype)])
    blocks_E = -(-sizes_E // size)
    last_E, first_row_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E) - sizes_E

    def through(expert, rows, weight, bias):
        if isinstance(weight, Int8Weight):
            rows, row_scale = quantize_rows(rotate(rows) if weight.rotated else rows)
            y = _one(weight.values_OI, expert, rows, jnp.int32).astype(jnp.float32)
            y = y * row_scale[:, None] * weight.scale_O[expert]
        else:
            y = _one(weight, expert, rows.astype(weight.dtype), jnp.float32)
        return y if bias is None else y + bias[expert]

    def body(index, y_MD):
        expert = jnp.searchsorted(last_E, index, side="right").astype(jnp.int32)
        row = first_row_E[expert] + (index - (last_E[expert] - blocks_E[expert])) * size
        x = lax.dynamic_slice(padded, (row, 0), (size, D))
        hidden = activation(through(expert, x, gate_up_EJD, gate_up_bias_EJ))
        y = through(expert, hidden, down_EDF, down_bias_ED)
        # Blocks come in the order of rows: what this one writes beyond its expert's rows, the next one overwrites.
        return lax.dynamic_update_slice(y_MD, y, (row, 0))

    return lax.fori_loop(0, last_E[-1], body, jnp.zeros((M + size, D), jnp.float32))[:M]


def _one(matrix_EOI: jax.Array, expert: jax.Array, rows_RI: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """y_RO of rows through one expert's matrix."""
    return lax.dot_general(
        lax.dynamic_index_in_dim(matrix_EOI, expert, 0, keepdims=False),
        rows_RI,
        (((1,), (1,)), ((), ())),
        preferred_element_type=dtype,
    ).T
