"""Low-rank adapters beside a product (Hu et al. 2021, arXiv:2106.09685): each token with the adapter of its own request.

The matrices of all loaded adapters are stacked by slot, zeros up to one rank, so that loading another one changes numbers and no
program. One face, bodies in order: `native` where the stack lies on one CPU device, else `xla`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ops import native
from ops.norm import RmsNorm

__all__ = ["Adapters", "LoraStack", "add_lora", "add_lora_rows"]


Stretches = tuple[tuple[int, int], ...]
"""(the column where it ends, the number of the tensor that it is of), one behind the other."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a_NRI", "b_NRO"], meta_fields=["native", "stretches"]
)
@dataclasses.dataclass(frozen=True)
class LoraStack:
    """The matrices of all adapters for one weight, by slot. Slot 0 is nobody's: whatever it holds counts as zeros.

    Attributes:
        a_NRI, b_NRO: A and, transposed, B with its scale; rows beyond an adapter's rank are zeros.
        native: static: they lie on one CPU device, so the native kernel may read them; B of bfloat16 is then `paired`.
        stretches: static: the weight is P tensors in one, each column's numbers are of one of them, and B has only those: it is
            [N, R / P, O], and A's R / P rows of tensor p belong to the columns that are of it. () where B has all R rows.
    """

    a_NRI: jax.Array
    b_NRO: jax.Array
    native: bool = False
    stretches: Stretches = ()

    @property
    def matrices(self) -> tuple[jax.Array, jax.Array]:
        """As native kernels take them."""
        return self.a_NRI, self.b_NRO

    @property
    def ends(self) -> np.ndarray:
        """The stretches as native kernels take them."""
        return np.array(self.stretches, np.int64).reshape(-1)

    def on_native(self) -> bool:
        """Whether native kernels read it here."""
        return self.native and str(self.a_NRI.dtype) in ("float32", "bfloat16") and native.available()


class Adapters(NamedTuple):
    """The adapters of a product's rows.

    Attributes:
        slot_T: int32, 0 for no adapter.
    """

    stack: LoraStack
    slot_T: jax.Array


PANEL = 32
"""Columns of B that lie together, as ops/native/lora.h has them."""


def paired(b_RO: np.ndarray) -> np.ndarray:
    """A slot's B as native kernels of bfloat16 read it: [ceil(O / 32), ceil(R / 2), 32, 2], neighbours of a column in pairs, zeros
    beyond R and O. A panel's numbers are read one behind the other."""
    R, O = b_RO.shape
    whole = np.zeros((R + R % 2, O + -O % PANEL), b_RO.dtype)
    whole[:R, :O] = b_RO
    return whole.reshape(-1, 2, whole.shape[1] // PANEL, PANEL).transpose(2, 0, 3, 1)


def paired_shape(ranks: int, outputs: int) -> tuple[int, ...]:
    """The shape of what `paired` gives."""
    return (-(-outputs // PANEL), -(-ranks // 2), PANEL, 2)


def add_lora(y_TO: jax.Array, x_TI: jax.Array, adapters: Adapters, norm: RmsNorm | None = None) -> jax.Array:
    """y + (x A^T) B^T with each token's own A and B; y itself at tokens without an adapter.

    Args:
        y_TO: what the base's product gave, any float dtype.
        x_TI: what it was given, never rotated or rounded.
        norm: applied to x first.
    Returns:
        [T, O] in y's dtype; the change is added up in float32. Of matrices in bfloat16 a body may round x and x A^T to that.
    """
    stack, slot_T = adapters
    if not stack.on_native():
        assert stack.b_NRO.ndim == 3, "only native kernels read pairs"
        x_TI = x_TI if norm is None else norm(x_TI)
        return (y_TO.astype(jnp.float32) + _xla(x_TI, stack, slot_T)).astype(y_TO.dtype)
    out = jax.ShapeDtypeStruct(y_TO.shape, jnp.float32)
    call = jax.ffi.ffi_call(native.target("jaxserve_lora"), out, input_output_aliases={5: 0})
    gain_I = jnp.zeros((0,), jnp.float32) if norm is None else norm.scale_I.astype(jnp.float32)
    operands = (x_TI.astype(jnp.float32), gain_I, slot_T, *stack.matrices, y_TO.astype(jnp.float32))
    return call(*operands, ends=stack.ends, eps=np.float32(0.0 if norm is None else norm.eps)).astype(y_TO.dtype)


def _xla(x_TI: jax.Array, stack: LoraStack, slot_T: jax.Array) -> jax.Array:
    """All slots for all tokens, then each token's own: on matrix units a few narrow products cost less than gathering matrices."""
    dtype = stack.a_NRI.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    a_NRI, b_NRO = stack.a_NRI[1:], stack.b_NRO[1:]
    if stack.stretches:  # B with all its rows again, zeros where they are of other tensors' columns
        ends, pieces = zip(*stack.stretches, strict=True)
        piece_O = np.repeat(pieces, np.diff([0, *ends]))
        own_P1O = np.arange(a_NRI.shape[1] // b_NRO.shape[1])[:, None, None] == piece_O
        b_NRO = jnp.where(own_P1O, b_NRO[:, None], 0).reshape(len(b_NRO), -1, len(piece_O))
    own_TN = jax.nn.one_hot(slot_T - 1, a_NRI.shape[0], dtype=jnp.float32)
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": jnp.float32}
    hidden_TNR = jnp.einsum("ti,nri->tnr", x_TI.astype(dtype), a_NRI, **options) * own_TN[..., None]
    return jnp.einsum("tnr,nro->to", hidden_TNR.astype(dtype), b_NRO, **options)


def add_lora_rows(x_TD: jax.Array, tokens_T: jax.Array, stack: LoraStack, slot_T: jax.Array) -> jax.Array:
    """An embedding's rows with each token's adapter: x + A[:, token] B.

    Args:
        x_TD: the table's rows.
        stack: a_NRI is [N, R, V]: A has a column for each token of the vocabulary.
    Returns:
        [T, D] in x's dtype.
    """
    hidden_TR = stack.a_NRI[slot_T, :, tokens_T].astype(jnp.float32)
    change_TD = jnp.einsum("tr,tro->to", hidden_TR, stack.b_NRO[slot_T].astype(jnp.float32))
    changed_TD = (x_TD.astype(jnp.float32) + change_TD).astype(x_TD.dtype)
    return jnp.where((slot_T > 0)[:, None], changed_TD, x_TD)
