"""8-bit pages of heads with an outlier: what is large in one channel does not cost the others their precision."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from ops import native, paged_attention
from ops.paged_attention import mixing, pages, reference
from ops.paged_attention.batch import KVSpec
from ops.paged_attention.cases import Case, make_arguments
from tests.ops.paged_attention.against_reference import fill, run


def rounded(x: np.ndarray) -> np.ndarray:
    scale = np.abs(x).max(-1, keepdims=True) / 127
    return np.round(x / scale) * scale


@pytest.mark.parametrize("head", [64, 96])
@pytest.mark.parametrize("body", ["xla", "native"])
def test_an_outlier_costs_little(body, head):
    """A third, at most, of what rounding heads as they are costs. 96 is mixed in blocks of 32."""
    layout = "panels" if body == "native" else "rows"
    if body == "native" and not native.available():
        pytest.skip(native.status())
    case = Case(num_kv_heads=1, group=2, head_dim=head, chunks=((0, 60),))
    arguments = make_arguments(case)
    q, k, v = arguments.q_TKGh.copy(), arguments.k_TKh.copy(), arguments.v_TKh.copy()
    k[..., 3] += 60 * np.sign(k[..., 3])
    q[..., 3] *= 0.02
    v[..., 1] *= 30
    arguments = dataclasses.replace(arguments, q_TKGh=q, k_TKh=k, v_TKh=v)

    def attended(k: np.ndarray, v: np.ndarray) -> np.ndarray:
        history = arguments.history_k, arguments.history_v
        return reference.attend(q, k, v, *history, arguments.batch, **arguments.options)[0]

    out, kv = run(body, arguments, fill(case, arguments, "int8", layout))
    assert kv.mixed
    want = attended(k, v)
    as_they_are = attended(rounded(k), rounded(v))
    assert np.square(out - want).mean() ** 0.5 < np.square(as_they_are - want).mean() ** 0.5 / 3


def test_what_is_not_mixed():
    """Latents, which are K and V at once, and pages that are not rounded to 8 bits."""
    latent = pages.allocate(KVSpec(1, 48, 0), 2, 16, "int8", None, "rows")
    wide = pages.allocate(KVSpec(1, 48, 48), 2, 16, "bfloat16", None, "rows")
    assert not latent.mixed and not wide.mixed


def test_mixing_is_its_own_inverse():
    x = np.random.default_rng(0).standard_normal((5, 2, 96)).astype(np.float32)
    np.testing.assert_allclose(mixing.mix(mixing.mix(x)), x, atol=1e-5)


@pytest.mark.parametrize("rotary", ["whole", "half", None])
def test_what_a_bias_adds_costs_nothing(rotary):
    """Biases hundreds of times as large as keys, in channels that turn slowly or not at all, behind position 20,000: without
    them keys give the same, and their rounding costs little."""
    rng = np.random.default_rng(0)
    K, G, h, start, count = 2, 3, 64, 20000, 60
    turning = {"whole": 64, "half": 32, None: 0}[rotary]
    frequencies = 1e6 ** -(np.arange(turning // 2, dtype=np.float32) * 2 / max(turning, 1))
    turns = None if rotary is None else (frequencies, 1.0)
    bias = np.zeros((K, h), np.float32)
    bias[:, [turning // 2 - 1, turning - 1] if turning else [5, 9]] = 300, -200
    qkv = rng.standard_normal((count, K, G + 2, h)).astype(np.float32)
    qkv[:, :, -2] += bias
    positions = start + np.arange(count, dtype=np.int32)
    batch = make_arguments(Case(num_kv_heads=K, group=G, head_dim=h, chunks=((0, count),))).batch

    def attended(dtype: str, given: np.ndarray | None) -> np.ndarray:
        kv = pages.allocate(KVSpec(K, h, h), 6, 16, dtype, None, "rows")
        with paged_attention.use_backend("xla"):
            tokens = np.zeros((batch.num_tokens, *qkv.shape[1:]), np.float32)
            tokens[:count] = qkv
            at = np.pad(positions, (0, batch.num_tokens - count))
            step = jax.jit(functools.partial(paged_attention.attend_rope, rotary=turns, scale=0.05))
            out, _ = step(tokens, at, kv=kv, batch=batch, bias_Kh=given)
        return np.asarray(out)[:count]

    want = attended("float32", None)
    np.testing.assert_array_equal(attended("float32", bias), want)  # nothing is rounded, nothing is taken off
    off, without = (np.square(attended("int8", given) - want).mean() ** 0.5 for given in (None, bias))
    assert without < off / 5
    assert without < 0.02
