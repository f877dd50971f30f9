"""Feed-forward experts that touch only the weights of the experts that were chosen.

Assignments (token, expert) are sorted by expert, so each expert's rows are neighbours. Accelerators multiply them by
`jax.lax.ragged_dot_general`. XLA's CPU backend expands that to a product with every expert (16 experts of 512 x 1024,
one token: 238 ms); there a native kernel reads the chosen experts' matrices where they lie (ops/native/grouped_dot.cc). Without
it, blocks of rows go through their expert one after the other, in a loop whose trip count the routing decides, which copies
each block's matrices.

In int8 (`quantize`, `pack`) and in blocks one native call does all of it on CPU: see ops/native/int8_experts.cc and
ops/native/blocks/blocks_experts.cc. In blocks other activations than the kernel's, and adapters, are computed between two calls.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from ops.linear.weights import Experts, StoredWeight, Weight, stored
from ops.linear.weights.int8 import PANEL
from ops.linear.weights.native import ACTIVATIONS
from ops.lora.experts import ExpertAdapters
from ops.per_device import per_device

Activation = Callable[[jax.Array], jax.Array]
"""Product with gate and up, [M, J], in -> hidden [M, F] out."""


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
    lora: ExpertAdapters | None = None,
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
        lora: what each token's adapter changes of the experts; not beside packed weights.
    Returns:
        [T, D] in x's dtype; products are accumulated in float32.
    """
    gate_up_bias_EJ = None if gate_up_bias_EJ is None else jnp.asarray(gate_up_bias_EJ)
    down_bias_ED = None if down_bias_ED is None else jnp.asarray(down_bias_ED)
    gate_up, down = stored(gate_up_EJD), stored(down_EDF)
    if gated is not None and lora is None:
        given = Experts(x_TD, ids_Tk, weights_Tk, gated, gate_up_bias_EJ, down_bias_ED)
        y_TD = gate_up.experts(down, given)
        if y_TD is not None:
            return y_TD
    if mesh is None or (expert_axis is None and model_axis is None):
        return _local(x_TD, ids_Tk, weights_Tk, gate_up, down, gate_up_bias_EJ, down_bias_ED, activation, lora)
    axes = tuple(axis for axis in (expert_axis, model_axis) if axis is not None)

    def on_device(
        x_TD: jax.Array,
        ids_Tk: jax.Array,
        weights_Tk: jax.Array,
        gate_up: Weight,
        down: Weight,
        gate_up_bias: jax.Array | None,
        down_bias: jax.Array | None,
        lora: ExpertAdapters | None,
    ) -> jax.Array:
        first = 0 if expert_axis is None else lax.axis_index(expert_axis) * gate_up.shape[0]
        if down_bias is not None and model_axis is not None:
            # Every device of the model axis adds its part of the product: only one may add the bias.
            down_bias = jnp.where(lax.axis_index(model_axis) == 0, down_bias, 0)
        here = (ids_Tk >= first) & (ids_Tk < first + gate_up.shape[0])
        # Experts of other devices: id E sorts last and belongs to no group.
        ids_Tk = jnp.where(here, ids_Tk - first, gate_up.shape[0])
        y_TD = _local(
            x_TD, ids_Tk, weights_Tk, stored(gate_up), stored(down), gate_up_bias, down_bias, activation, lora
        )
        return lax.psum(y_TD, axes)

    P = PartitionSpec
    weights = gate_up.specs(P(expert_axis, model_axis, None)), down.specs(P(expert_axis, None, model_axis))
    biases = P(expert_axis, model_axis), P(expert_axis)
    own = None if lora is None else lora.specs(expert_axis, model_axis)
    return per_device(on_device, mesh, in_specs=(P(), P(), P(), *weights, *biases, own), out_specs=P())(
        x_TD, ids_Tk, weights_Tk, gate_up_EJD, down_EDF, gate_up_bias_EJ, down_bias_ED, lora
    )


def can_pack(shape_EOI: tuple[int, ...], gated: str | None) -> bool:
    """Whether `pack` can lay out experts of this shape and activation: whole panels each, and an activation that the
    kernel has."""
    return gated in ACTIVATIONS and in_panels(shape_EOI)


def in_panels(shape_EOI: tuple[int, ...]) -> bool:
    """Whether each expert's channels are whole panels, as those of weights in blocks must be, whatever the activation."""
    return shape_EOI[1] % PANEL == 0


def pack_experts(weight: Weight) -> Weight:
    """Quantized experts in the layout of this machine's fastest kernel; unchanged where there is no other.

    Args:
        weight: [E, O, I], of which `can_pack` is true.
    Returns:
        one of [E * O, I], where `ops.linear.pack` makes one.
    """
    return weight.packed_experts() if isinstance(weight, StoredWeight) else weight


def _local(
    x_TD: jax.Array,
    ids_Tk: jax.Array,
    weights_Tk: jax.Array,
    gate_up: StoredWeight,
    down: StoredWeight,
    gate_up_bias_EJ: jax.Array | None,
    down_bias_ED: jax.Array | None,
    activation: Activation,
    lora: ExpertAdapters | None,
) -> jax.Array:
    """On one device; an id of E (or more) is nobody's and yields zeros."""
    (T, k), E = ids_Tk.shape, down.shape[0] if len(down.shape) == 3 else down.shape[0] // x_TD.shape[1]
    ids_M = ids_Tk.reshape(-1)
    order_M = jnp.argsort(ids_M, stable=True)
    sorted_M = ids_M[order_M]
    sizes_E = jnp.zeros(E, jnp.int32).at[ids_M].add(1, mode="drop")
    rows_MD = x_TD[order_M // k]
    own = None if lora is None else lora.sorted(order_M // k, jnp.minimum(sorted_M, E - 1), sizes_E)

    def around(rows_MD: jax.Array, up_dot: Activation, down_dot: Activation) -> jax.Array:
        if own is not None:
            up_dot, down_dot = own.beside(up_dot, own.gate_up), own.beside(down_dot, own.down)
        hidden_MJ = up_dot(rows_MD)
        if gate_up_bias_EJ is not None:
            hidden_MJ = hidden_MJ + gate_up_bias_EJ[jnp.minimum(sorted_M, E - 1)]
        y_MD = down_dot(activation(hidden_MJ).astype(x_TD.dtype))
        return y_MD if down_bias_ED is None else y_MD + down_bias_ED[jnp.minimum(sorted_M, E - 1)]

    def ragged(rows_MD: jax.Array) -> jax.Array:
        def dot(weight: StoredWeight) -> Activation:
            return lambda rows: weight.grouped(rows, sizes_E, sorted_M)

        return around(rows_MD, dot(gate_up), dot(down))

    def cpu(rows_MD: jax.Array) -> jax.Array:
        if gate_up.has_grouped_kernel() and down.has_grouped_kernel():

            def dot(weight: StoredWeight) -> Activation:
                return lambda rows: weight.grouped_on_cpu(rows, sizes_E)

            return around(rows_MD, dot(gate_up), dot(down))
        if own is not None or len(gate_up.shape) < 3 or len(down.shape) < 3:
            return ragged(rows_MD)
        return _blocks(rows_MD, sizes_E, gate_up, down, gate_up_bias_EJ, down_bias_ED, activation)

    y_MD = lax.platform_dependent(rows_MD, cpu=cpu, default=ragged)
    # Rows beyond the groups hold anything.
    y_MD = jnp.where((sorted_M < E)[:, None], y_MD, 0.0)
    y_TkD = y_MD[jnp.argsort(order_M)].reshape(T, k, -1)
    return jnp.einsum("tkd,tk->td", y_TkD, weights_Tk.astype(jnp.float32)).astype(x_TD.dtype)


def block_rows(num_rows: int, num_experts: int, dtype: jax.typing.DTypeLike) -> int:
    """Rows that go through an expert at once on CPU.

    One at a time while most experts have one or two (a float32 matrix-vector product runs at the memory's speed; in
    bfloat16 it needs a second row to leave the slow path), else about what an expert has.
    """
    if num_rows <= 2 * num_experts:
        return 1 if jnp.dtype(dtype) == jnp.float32 else 2
    return min(64, max(8, 1 << (num_rows // num_experts - 1).bit_length()))


def _blocks(
    rows_MD: jax.Array,
    sizes_E: jax.Array,
    gate_up: StoredWeight,
    down: StoredWeight,
    gate_up_bias_EJ: jax.Array | None,
    down_bias_ED: jax.Array | None,
    activation: Activation,
) -> jax.Array:
    (M, D), E = rows_MD.shape, gate_up.shape[0]
    size = block_rows(M, E, gate_up.dtype)
    padded = jnp.concatenate([rows_MD, jnp.zeros((size, D), rows_MD.dtype)])
    blocks_E = -(-sizes_E // size)
    last_E, first_row_E = jnp.cumsum(blocks_E), jnp.cumsum(sizes_E) - sizes_E

    def through(expert: jax.Array, rows: jax.Array, weight: StoredWeight, bias: jax.Array | None) -> jax.Array:
        y = weight.of_expert(expert, rows)
        return y if bias is None else y + bias[expert]

    def body(index: jax.Array, y_MD: jax.Array) -> jax.Array:
        expert = jnp.searchsorted(last_E, index, side="right").astype(jnp.int32)
        row = first_row_E[expert] + (index - (last_E[expert] - blocks_E[expert])) * size
        x = lax.dynamic_slice(padded, (row, 0), (size, D))
        hidden = activation(through(expert, x, gate_up, gate_up_bias_EJ))
        y = through(expert, hidden, down, down_bias_ED)
        # Blocks come in the order of rows: what this one writes beyond its expert's rows, the next one overwrites.
        return lax.dynamic_update_slice(y_MD, y, (row, 0))

    return lax.fori_loop(0, last_E[-1], body, jnp.zeros((M + size, D), jnp.float32))[:M]
