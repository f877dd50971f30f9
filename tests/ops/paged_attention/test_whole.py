"""Attention to all of something, by native kernels, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.linear import CentredNorm, linear, quantize
from ops.linear.weights.int8 import pack_int8
from ops.paged_attention import native as by_pages
from ops.paged_attention import whole
from ops.paged_attention.batch import AttentionBatch

H, h = 3, 32
ROUNDED = 2e-2
"""Keys, values and weights are bfloat16."""

pytestmark = pytest.mark.skipif(not whole.supports(H, h, "cpu"), reason="this machine has no native kernels")


def attended(q_THh, k_SHh, v_SHh, size=h):
    scores = np.einsum("thd,shd->hts", q_THh, k_SHh) * size**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v_SHh)


@pytest.mark.parametrize("turning", [False, True])
def test_every_token_sees_all_of_its_row(turning):
    S, counts = 150, (150, 1, 97)
    random = np.random.default_rng(0)
    qkv = random.standard_normal((len(counts), S, H, 3, h)).astype(np.float32)
    angle_TA = random.uniform(0, 6, (len(counts) * S, h // 2)).astype(np.float32)
    angles = (jnp.cos(angle_TA), jnp.sin(angle_TA)) if turning else None
    run = jax.jit(lambda x, n: whole.attend_all(x, n, scale=h**-0.5, angles=angles))
    out = np.asarray(run(qkv, jnp.array(counts)))  # here before qkv is written to
    if turning:
        cos, sin = (f(angle_TA).reshape(len(counts), S, 1, 1, -1) for f in (np.cos, np.sin))
        a, b = np.split(qkv[:, :, :, :2], 2, axis=-1)
        qkv[:, :, :, :2] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    for row, count in enumerate(counts):
        q, k, v = (qkv[row, :count, :, part] for part in range(3))
        np.testing.assert_allclose(out[row, :count], attended(q, k, v), atol=ROUNDED)
        assert not np.asarray(out[row, count:]).any()


@pytest.mark.parametrize(("size", "tokens"), [(64, 300), (72, 65), (6, 5)])
@pytest.mark.parametrize("level", ["generic", "vnni"])
def test_tokens_attend_in_int8(size, tokens, level):
    """Keys of several stretches, the last turn of one not full; heads that are no whole vectors, nor whole fours."""
    random = np.random.default_rng(2)
    qkv = random.standard_normal((2, tokens, 2, 3, size)).astype(np.float32)
    qkv[0, 0, 0, 0] = 0.0  # a query of zeros sees all alike
    counts = (tokens, tokens - 1)
    try:
        if native.set_isa(level) != level:
            pytest.skip(f"this machine has no {level}")
        of = jnp.asarray(qkv.reshape(2 * tokens, 2, 3, size))
        out = np.asarray(by_pages.attend_among(of, jnp.array(counts), size**-0.5, None)).reshape(2, tokens, 2, size)
    finally:
        native.set_isa(None)
    for row, count in enumerate(counts):
        expected = attended(*(qkv[row, :count, :, part] for part in range(3)), size)
        error = np.linalg.norm(out[row, :count] - expected) / np.linalg.norm(expected)
        assert error < ROUNDED, error
        assert not out[row, count:].any()


def test_products_are_kept_at_once():
    """Of more rows than a thread takes at once, the last page not full."""
    S, D, random = 85, 64, np.random.default_rng(3)
    x = jnp.asarray(random.standard_normal((S, D)).astype(np.float32))
    weights = [
        pack_int8(quantize(jnp.asarray(random.standard_normal((2 * H * h, D)), jnp.float32), "int8")) for _ in range(3)
    ]
    biases = [None, *jnp.asarray(random.standard_normal((2, 2 * H * h)).astype(np.float32))]
    norm = CentredNorm(jnp.ones(D), jnp.full(D, 0.5), 1e-5)
    for level in ("generic", "avx2", "vnni"):
        try:
            if native.set_isa(level) != level:
                continue
            found = np.asarray(whole.keep_products(x, weights, biases, H, norm))
            parts = [linear(x, *one, norm=norm).reshape(S, H, 2, h) for one in zip(weights, biases, strict=True)]
            wanted = np.concatenate([whole.keep(part[:, :, 0], part[:, :, 1]) for part in parts])
        finally:
            native.set_isa(None)
        np.testing.assert_array_equal(found, wanted, err_msg=level)


def test_rows_and_pieces_see_what_is_kept_for_them():
    """Of three things with two parts each; a padded row, a padded piece, and a gap behind a piece."""
    S, random = 75, np.random.default_rng(1)
    k, v = random.standard_normal((2, 3, 2, S, H, h)).astype(np.float32)
    store = np.stack([np.concatenate([whole.keep(k[m, part], v[m, part]) for part in range(2)]) for m in range(3)])
    assert store.shape == (3, 2 * whole.kept_size(S, H, h))
    assert np.array_equal(whole.kept_keys(store[1].reshape(2, -1)[1], S, H, h), k[1, 1].astype(jnp.bfloat16))
    q = random.standard_normal((3 + 48, H, h)).astype(np.float32)
    ints = {name: jnp.array(value, jnp.int32) for name, value in {
        "kv_index_T": [1] * 51, "decode_pages_BP": [[1], [2], [0]], "decode_len_B": [5, 9, 0], "chunk_pages_RP": [[3], [4], [0]],
        "chunk_start_R": [0, 32, 0], "chunk_qlen_R": [20, 5, 0], "chunk_len_R": [20, 30, 0], "chunk_row_N": [0, 0, 1],
    }.items()}  # fmt: skip

    @jax.jit
    def run(q, store, row_B, row_R):
        how = {"positions": S, "part": 1, "scale": h**-0.5}
        return whole.attend_kept(q, store, row_B, row_R, AttentionBatch(**ints), **how)

    out = np.asarray(run(q, store, jnp.array([2, 0, 0]), jnp.array([1, 2, 0])))
    for tokens, thing in (([0], 2), ([1], 0), (range(3, 23), 1), (range(35, 40), 2)):
        np.testing.assert_allclose(out[list(tokens)], attended(q[list(tokens)], k[thing, 1], v[thing, 1]), atol=ROUNDED)
    assert not out[[2, *range(23, 35), *range(40, 51)]].any()
    once = jax.jit(lambda q, row: whole.attend_kept_once(q, row, positions=S, part=0, scale=h**-0.5))(q, store[1:2])
    np.testing.assert_allclose(once, attended(q, k[1, 0], v[1, 0]), atol=ROUNDED)
