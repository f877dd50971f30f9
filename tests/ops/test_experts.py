import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import experts as module
from ops.experts import block_rows, experts

D, F = 24, 20


def activation(gate_up_MJ):
    gate, up = jnp.split(gate_up_MJ, 2, axis=-1)
    return jax.nn.silu(gate) * up


def every_expert(x, ids, weights, gate_up, down, gate_up_bias, down_bias):
    """The plain sum over all experts, in float64."""
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    y = np.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(ids[t], weights[t], strict=True):
            gate, up = np.split(gate_up[e] @ x[t] + gate_up_bias[e], 2)
            y[t] += w * (down[e] @ (gate / (1 + np.exp(-gate)) * up) + down_bias[e])
    return y


def arguments(T, E, k, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(E, k, replace=False) for _ in range(T)]).astype(np.int32)
    arrays = [rng.standard_normal(shape) for shape in ((T, k), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D))]
    weights, gate_up, down, gate_up_bias, down_bias = (a.astype(np.float32) * 0.3 for a in arrays)
    x = rng.standard_normal((T, D)).astype(np.float32)
    return x, ids, weights, gate_up, down, gate_up_bias, down_bias


@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (3, 4, 4), (7, 16, 3), (64, 4, 1), (130, 6, 2)])
@pytest.mark.parametrize("bias", [False, True])
def test_against_every_expert(T, E, k, bias):
    x, ids, weights, gate_up, down, *biases = arguments(T, E, k)
    given = {"gate_up_bias_EJ": biases[0], "down_bias_ED": biases[1]} if bias else {}
    got = jax.jit(lambda *a: experts(*a, activation, **given))(x, ids, weights, gate_up, down)
    used = biases if bias else [np.zeros_like(b) for b in biases]
    np.testing.assert_allclose(got, every_expert(x, ids, weights, gate_up, down, *used), atol=1e-4)


def test_all_tokens_to_one_expert():
    x, ids, weights, gate_up, down, *biases = arguments(40, 5, 1)
    ids[:] = 3
    got = jax.jit(lambda *a: experts(*a, activation))(x, ids, weights, gate_up, down)
    zeros = [np.zeros_like(b) for b in biases]
    np.testing.assert_allclose(got, every_expert(x, ids, weights, gate_up, down, *zeros), atol=1e-4)


def test_the_accelerators_body(monkeypatch):
    x, ids, weights, gate_up, down, *biases = arguments(9, 4, 2)
    monkeypatch.setattr(module.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    got = experts(x, ids, weights, gate_up, down, activation, gate_up_bias_EJ=biases[0], down_bias_ED=biases[1])
    np.testing.assert_allclose(got, every_expert(x, ids, weights, gate_up, down, *biases), atol=1e-4)


def test_bfloat16_weights():
    x, ids, weights, gate_up, down, *biases = arguments(5, 4, 2)
    rounded = [jnp.asarray(a, jnp.bfloat16) for a in (gate_up, down)]
    got = jax.jit(lambda *a: experts(*a, activation))(x, ids, weights, *rounded)
    zeros = [np.zeros_like(b) for b in biases]
    wanted = every_expert(x, ids, weights, *(np.asarray(a, np.float32) for a in rounded), *zeros)
    np.testing.assert_allclose(got, wanted, atol=0.03)
    assert got.dtype == jnp.float32


def test_block_rows():
    assert block_rows(2, 8, jnp.float32) == 1
    assert block_rows(2, 8, jnp.bfloat16) == 2
    assert block_rows(128, 16, jnp.float32) == 8
    assert block_rows(10_000, 16, jnp.float32) == 64
