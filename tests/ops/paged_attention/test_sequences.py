"""Attention of whole sequences against a formula that is written out: values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops.paged_attention import Sequences, attend, attend_rope, sequences
from ops.rope import inverse_frequencies, rope

K, G, h = 2, 3, 8

CASES = {
    "plain": {},
    "window": {"window": 5},
    "chunk": {"chunk": 7},
    "softcap and sinks": {"softcap": 3.0, "sinks": True},
    "window and sinks": {"window": 40, "sinks": True},
}


def plainly(q, k, v, segments, positions, *, scale, window=None, softcap=None, sinks_KG=None, chunk=None):
    """One row, every score there: [S, K, G, h]."""
    score = jnp.einsum("qkgh,skh->kgqs", q, k) * scale
    if softcap:
        score = softcap * jnp.tanh(score / softcap)
    i, j = jnp.arange(len(q))[:, None], jnp.arange(len(q))[None]
    seen = (i >= j) & (segments[:, None] == segments[None])
    if window:
        seen &= i - j < window
    if chunk:
        seen &= positions[:, None] // chunk == positions[None] // chunk
    weight = jnp.where(seen, jnp.exp(score), 0.0)
    total = weight.sum(-1, keepdims=True)
    if sinks_KG is not None:
        total = total + jnp.exp(sinks_KG)[:, :, None, None]
    return jnp.einsum("kgqs,skh->qkgh", weight / total, v)


@pytest.mark.parametrize(("length", "kept"), [(24, True), (300, False)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, length, kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(sequences, "KEPT_SCORES", 0)
    options = dict(CASES[name])
    rng = np.random.default_rng(3)
    B = 2
    q, k, v = (jnp.asarray(rng.standard_normal((B * length, K, *shape)), jnp.float32) for shape in ((G, h), (h,), (h,)))
    cut = length // 3
    segments = np.ones((B, length), np.int32)
    segments[0, cut:] = 2
    segments[1, -4:] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (B, 1))
    positions[0, cut:] -= cut
    sinks = jnp.asarray(rng.standard_normal((K, G)), jnp.float32) if options.pop("sinks", False) else None
    options |= {"scale": h**-0.5}
    batch = Sequences(jnp.asarray(segments), jnp.asarray(positions))
    weight = jnp.asarray(rng.standard_normal((B * length, K, G, h)), jnp.float32)

    def ours(q, k, v, sinks):
        out, kv = attend(q, k, v, None, batch, sinks_KG=sinks, **options)
        again, _ = attend(q, None, None, kv, batch, sinks_KG=sinks, **options)  # another layer that reads them
        assert again.shape == out.shape
        return (out * weight).sum(), out

    def theirs(q, k, v, sinks):
        rows = [
            plainly(
                *(x.reshape(B, length, *x.shape[1:])[b] for x in (q, k, v)), segments[b], positions[b], sinks_KG=sinks,
                **options,
            )
            for b in range(B)
        ]  # fmt: skip
        out = jnp.concatenate(rows)
        return (out * weight).sum(), out

    learned = (0, 1, 2) if sinks is None else (0, 1, 2, 3)
    grad = [jax.jit(jax.grad(f, argnums=learned, has_aux=True))(q, k, v, sinks) for f in (ours, theirs)]
    np.testing.assert_allclose(grad[0][1], grad[1][1], atol=2e-5)
    for found, expected in zip(grad[0][0], grad[1][0], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("share", [1.0, 0.5, None])
def test_a_fused_projection_is_rotated_and_a_latent_is_its_own_value(share):
    """Values and gradients, of heads that are rotated whole, in part and not at all."""
    rng = np.random.default_rng(5)
    length = 20
    qkv = jnp.asarray(rng.standard_normal((length, K, G + 2, h)), jnp.float32)
    weight = jnp.asarray(rng.standard_normal((length, K, G, h)), jnp.float32)
    positions, zeros = jnp.arange(length, dtype=jnp.int32), np.zeros(length, np.int32)
    batch = Sequences(jnp.zeros((1, length), jnp.int32), positions[None], single=True)
    told = {"rope_theta": 100.0, "partial_rotary_factor": share}
    rotary = None if share is None else inverse_frequencies(told, h)

    def turned(x):
        return x if rotary is None else rope(x, positions, *rotary)

    def ours(qkv):
        out, _ = attend_rope(qkv, positions, rotary, None, batch, scale=0.3)
        return (out * weight).sum(), out

    def theirs(qkv):
        out = plainly(turned(qkv[:, :, :-2]), turned(qkv[:, :, -2]), qkv[:, :, -1], zeros, zeros, scale=0.3)
        return (out * weight).sum(), out

    (mine, found), (other, expected) = (jax.grad(f, has_aux=True)(qkv) for f in (ours, theirs))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(mine, other, atol=1e-4)
    q, k = turned(qkv[:, :, :-2]), turned(qkv[:, :, -2])
    latent, _ = attend(q, k, None, None, batch, scale=0.3)
    np.testing.assert_allclose(latent, plainly(q, k, k, zeros, zeros, scale=0.3), atol=2e-5)
