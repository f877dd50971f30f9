"""What the tests of every body of paged attention share: filling pages, one step, and comparing both with the reference."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ops import paged_attention
from ops.paged_attention import mixing, pages, reference
from ops.paged_attention.cases import Arguments, Case

ROUNDING = {"bfloat16": 2.0**-8, "int8": 1 / 127, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}
"""How far a stored number may be from the one that was written, relative to the largest of its row."""


def fill(case: Case, arguments: Arguments, dtype, layout: str) -> paged_attention.KVPages:
    """Pages holding the case's history, leftovers of other requests included, as plain XLA writes them."""
    num_pages, size, K, _ = arguments.history_k.shape
    kv = pages.allocate(case.spec, num_pages, size, dtype, None, layout)
    k = arguments.history_k.reshape(num_pages * size, K, -1)
    v = None if arguments.history_v is None else arguments.history_v.reshape(num_pages * size, K, -1)
    if kv.mixed:
        k, v = mixing.mix(k), mixing.mix(v)
    return jax.jit(pages.write)(kv, k, v, jnp.arange(num_pages * size, dtype=jnp.int32))


@functools.cache
def _step(backend: str, **options):
    """One jitted function for a case, whatever the native instruction set: only the backend decides what is compiled."""
    return jax.jit(functools.partial(paged_attention.attend, **options), donate_argnums=3)


def run(backend: str, arguments: Arguments, kv, dtype=np.float32):
    """attend's output (float32 numpy) and pages; those that were given are gone."""
    options = dict(arguments.options)
    sinks_KG = options.pop("sinks_KG")
    q, k, v = (
        None if x is None else jnp.asarray(x, dtype) for x in (arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh)
    )
    with paged_attention.use_backend(backend):
        step = _step(backend, **options)
        out, kv = jax.block_until_ready(step(q, k, v, kv, arguments.batch, sinks_KG=sinks_KG))
    assert out.dtype == q.dtype
    return np.asarray(out, np.float32), kv


_read = jax.jit(pages.read, static_argnums=2)


def plain(kv) -> tuple[np.ndarray, np.ndarray | None]:
    """Pages as [page, slot, K, h] float32."""
    k, v = _read(kv, np.arange(kv.num_pages), jnp.float32)
    if kv.mixed:
        k, v = mixing.mix(k), mixing.mix(v)
    k, v = np.asarray(k).swapaxes(1, 2), np.asarray(v).swapaxes(1, 2)
    return k, v if kv.spec.v_head_dim else None


def expected(arguments: Arguments, kv) -> np.ndarray:
    """The reference's output on what the pages hold after the step (so that rounding into pages is not counted)."""
    k_NsKh, v_NsKh = plain(kv)
    page, slot = np.divmod(arguments.batch.kv_index_T, kv.page_size)
    new_v = None if v_NsKh is None else v_NsKh[page, slot]
    return reference.attend(
        arguments.q_TKGh, k_NsKh[page, slot], new_v, k_NsKh, v_NsKh, arguments.batch, **arguments.options
    )[0]


def assert_is_reference(arguments: Arguments, out: np.ndarray, kv) -> None:
    """Output and pages of a float32 step are the reference's."""
    want, want_k, want_v = reference.attend(
        arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh, arguments.history_k, arguments.history_v,
        arguments.batch, **arguments.options,
    )  # fmt: skip
    np.testing.assert_allclose(out, want, rtol=2e-5, atol=2e-5)
    k_NsKh, v_NsKh = plain(kv)
    np.testing.assert_array_equal(k_NsKh[1:], want_k[1:].astype(np.float32))
    if want_v is not None:
        np.testing.assert_array_equal(v_NsKh[1:], want_v[1:].astype(np.float32))


def assert_new_keys_are_stored(arguments: Arguments, kv, dtype: str, activations="float32") -> None:
    """Narrow pages hold the step's new keys, rounded as their dtype rounds."""
    k_NsKh, _ = plain(kv)
    page, slot = np.divmod(arguments.batch.kv_index_T, kv.page_size)
    real = page > 0
    new_k = np.asarray(jnp.asarray(arguments.k_TKh, activations), np.float32)[real]
    stored_k = k_NsKh[page, slot][real]
    if kv.mixed:  # as it is rounded
        new_k, stored_k = np.asarray(mixing.mix(new_k)), np.asarray(mixing.mix(stored_k))
    largest = np.abs(new_k).max(-1, keepdims=True)
    assert (np.abs(stored_k - new_k) <= largest * ROUNDING[dtype]).all()
