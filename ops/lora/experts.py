"""Low-rank adapters in the experts of a mixture: each row with its token's adapter and its own expert."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ops.lora import LoraStack

ROWS = 16
"""That are computed at once on CPU, where each row's own matrices are gathered."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertAdapters:
    """What adapters change of the experts of a layer.

    Attributes:
        gate_up, down: stacks whose second axis is [E R]: expert after expert.
        slot_T: int32, 0 for no adapter.
    """

    gate_up: LoraStack
    down: LoraStack
    slot_T: jax.Array

    def specs(self, expert_axis: str | None, model_axis: str | None) -> ExpertAdapters:
        """How they are cut over a mesh, in their own structure."""
        P = PartitionSpec
        whole, cut = P(None, expert_axis, None), P(None, expert_axis, model_axis)
        return ExpertAdapters(
            dataclasses.replace(self.gate_up, a_NRI=whole, b_NRO=cut),  # type: ignore[arg-type]
            dataclasses.replace(self.down, a_NRI=cut, b_NRO=whole),  # type: ignore[arg-type]
            P(),  # type: ignore[arg-type]
        )

    def sorted(self, token_M: jax.Array, expert_M: jax.Array, sizes_E: jax.Array) -> SortedAdapters:
        """For rows that are sorted by expert: of which token and of which expert each is."""
        return SortedAdapters(self.gate_up, self.down, self.slot_T[token_M], expert_M, sizes_E)


@dataclasses.dataclass(frozen=True)
class SortedAdapters:
    """`ExpertAdapters` for rows sorted by expert, `sizes_E` of each; rows behind the last group come out as anything."""

    gate_up: LoraStack
    down: LoraStack
    slot_M: jax.Array
    expert_M: jax.Array
    sizes_E: jax.Array

    def beside(self, dot: Callable[[jax.Array], jax.Array], stack: LoraStack) -> Callable[[jax.Array], jax.Array]:
        """A product, float32, and what adapters add to it."""
        return lambda x_MI: dot(x_MI) + self.change(x_MI, stack)

    def change(self, x_MI: jax.Array, stack: LoraStack) -> jax.Array:
        """float32 [M, O]: (x A^T) B^T with each row's own A and B; zeros at rows without an adapter."""
        return lax.platform_dependent(
            x_MI, cpu=lambda x: self._gathered(x, stack), default=lambda x: self._ragged(x, stack)
        )

    def _by_expert(self, matrices_NRX: jax.Array) -> jax.Array:
        """[N, E, R, X]."""
        N, _, X = matrices_NRX.shape
        return matrices_NRX.reshape(N, self.sizes_E.shape[0], -1, X)

    def _gathered(self, x_MI: jax.Array, stack: LoraStack) -> jax.Array:
        a, b = self._by_expert(stack.a_NRI), self._by_expert(stack.b_NRO)
        (M, inputs), rows = x_MI.shape, min(ROWS, x_MI.shape[0])
        missing = -M % rows

        def block(given: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            x, slot, expert = given
            precision = lax.Precision.HIGHEST
            a_mri, b_mro = a[slot, expert].astype(jnp.float32), b[slot, expert].astype(jnp.float32)
            hidden = jnp.einsum("mi,mri->mr", x.astype(jnp.float32), a_mri, precision=precision)
            change = jnp.einsum("mr,mro->mo", hidden, b_mro, precision=precision)
            return jnp.where((slot > 0)[:, None], change, 0.0)

        parts = (
            jnp.pad(x_MI, ((0, missing), (0, 0))).reshape(-1, rows, inputs),
            jnp.pad(self.slot_M, (0, missing)).reshape(-1, rows),
            jnp.pad(self.expert_M, (0, missing)).reshape(-1, rows),
        )
        return lax.map(block, parts).reshape(M + missing, -1)[:M]

    def _ragged(self, x_MI: jax.Array, stack: LoraStack) -> jax.Array:
        """All slots of a row's expert, then its own: two grouped products."""
        a, b = self._by_expert(stack.a_NRI)[1:], self._by_expert(stack.b_NRO)[1:]
        N, E, R, _ = a.shape
        own_MN = jax.nn.one_hot(self.slot_M - 1, N, dtype=jnp.float32)
        a_EI = a.transpose(1, 3, 0, 2).reshape(E, -1, N * R)
        b_EO = b.transpose(1, 0, 2, 3).reshape(E, N * R, -1)
        hidden = lax.ragged_dot(x_MI.astype(a.dtype), a_EI, self.sizes_E, preferred_element_type=jnp.float32)
        hidden = (hidden.reshape(-1, N, R) * own_MN[..., None]).reshape(-1, N * R).astype(b.dtype)
        return lax.ragged_dot(hidden, b_EO, self.sizes_E, preferred_element_type=jnp.float32)
