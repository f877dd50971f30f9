import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import experts as module
from ops import native
from ops.experts import block_rows, can_pack, experts, pack_experts
from ops.linear import Int8Weight, PackedInt8Weight, quantize
from ops.linear.weights import DenseWeight, stored
from ops.linear.weights.block_round import eight_bits, four_bits
from ops.lora import LoraStack
from ops.lora.experts import ExpertAdapters

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


def arguments(T, E, k, seed=0, D=D, F=F):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(E, k, replace=False) for _ in range(T)]).astype(np.int32)
    arrays = [rng.standard_normal(shape) for shape in ((T, k), (E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D))]
    weights, gate_up, down, gate_up_bias, down_bias = (a.astype(np.float32) * 0.3 for a in arrays)
    x = rng.standard_normal((T, D)).astype(np.float32)
    return x, ids, weights, gate_up, down, gate_up_bias, down_bias


@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (3, 4, 4), (7, 16, 3), (64, 4, 1), (130, 6, 2)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("body", ["generic", "avx2", "avx512", "blocks"])
def test_against_every_expert(T, E, k, bias, body, monkeypatch):
    if body == "blocks":
        monkeypatch.setattr(DenseWeight, "has_grouped_kernel", lambda weight: False)
    elif not native.available():
        pytest.skip("no native kernels")
    elif native.set_isa(body) != body:
        native.set_isa(None)
        pytest.skip(f"this CPU has no {body}")
    x, ids, weights, gate_up, down, *biases = arguments(T, E, k)
    given = {"gate_up_bias_EJ": biases[0], "down_bias_ED": biases[1]} if bias else {}
    got = jax.jit(lambda *a: experts(*a, activation, **given))(x, ids, weights, gate_up, down)
    used = biases if bias else [np.zeros_like(b) for b in biases]
    np.testing.assert_allclose(got, every_expert(x, ids, weights, gate_up, down, *used), atol=1e-4)
    if native.available():
        native.set_isa(None)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("D", "F"), [(64, 48), (37, 5), (130, 67)])
def test_native_products_of_any_width(dtype, D, F):
    x, ids, weights, gate_up, down, *biases = arguments(33, 7, 3, D=D, F=F)
    ids = np.where(ids == 2, 7, ids).astype(np.int32)  # one expert is nobody's, one is another device's
    rounded = [jnp.asarray(a, dtype) for a in (gate_up, down)]
    assert all(stored(a).has_grouped_kernel() for a in rounded)
    got = jax.jit(lambda *a: experts(*a, activation))(x, ids, weights, *rounded)
    padded = [np.concatenate([np.asarray(a, np.float32), np.zeros((1, *a.shape[1:]), np.float32)]) for a in rounded]
    zeros = [np.zeros((8, b.shape[1]), np.float32) for b in biases]
    np.testing.assert_allclose(got, every_expert(x, ids, weights, *padded, *zeros), atol=1e-4)


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


def int8_arguments(T, E, k, D=48, F=32):
    """As `arguments`, the weights rounded, with the matrices that the rounded ones stand for."""
    x, ids, weights, gate_up, down, *biases = arguments(T, E, k, D=D, F=F)
    rounded = [quantize(jnp.asarray(a), "int8") for a in (gate_up, down)]
    dense = [np.asarray(w.dequantize()) for w in rounded]
    return x, ids, weights, rounded, dense, biases


@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (5, 4, 4), (130, 6, 2)])
@pytest.mark.parametrize("body", ["cpu", "default"])
def test_int8_in_plain_xla(T, E, k, body, monkeypatch):
    x, ids, weights, rounded, dense, biases = int8_arguments(T, E, k)
    if body == "default":
        monkeypatch.setattr(module.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    got = experts(x, ids, weights, *rounded, activation, gate_up_bias_EJ=biases[0], down_bias_ED=biases[1])
    wanted = every_expert(x, ids, weights, *dense, *biases)
    # On CPU activations are rounded too, by row: 1 / 254 of the largest.
    np.testing.assert_allclose(got, wanted, atol=(0.02 if body == "cpu" else 1e-5) * np.abs(wanted).max())


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize(("T", "E", "k"), [(1, 8, 2), (5, 4, 4), (130, 6, 2), (200, 3, 1)])
@pytest.mark.parametrize(("D", "F"), [(48, 32), (80, 16), (128, 176)])
@pytest.mark.parametrize("isa", ["generic", None])
def test_int8_native(T, E, k, D, F, isa):
    x, ids, weights, rounded, dense, biases = int8_arguments(T, E, k, D, F)
    assert all(can_pack(w.shape, "silu") for w in rounded)
    packed = [pack_experts(w) for w in rounded]
    assert all(isinstance(w, PackedInt8Weight) for w in packed)
    native.set_isa(isa)
    try:
        for bias in (False, True):
            given = {"gate_up_bias_EJ": biases[0], "down_bias_ED": biases[1]} if bias else {}
            got = jax.jit(lambda *a, given=given: experts(*a, activation, gated="silu", **given))(
                x, ids, weights, *packed
            )
            wanted = every_expert(x, ids, weights, *dense, *(biases if bias else [np.zeros_like(b) for b in biases]))
            np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())
    finally:
        native.set_isa(None)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize(("T", "E", "k", "D", "F"), [(1, 8, 2, 48, 32), (5, 4, 4, 128, 176), (130, 3, 1, 80, 16)])
@pytest.mark.parametrize("isa", ["generic", None])
def test_blocks_native(T, E, k, D, F, isa):
    """Four bits; an expert's panels may share a group with the next one's. Ids that are nobody's add nothing."""
    x, ids, weights, gate_up, down, *biases = arguments(T, E, k, D=D, F=F)
    packed = [four_bits(np.asarray(w, np.float32).reshape(-1, w.shape[-1])) for w in (gate_up, down)]
    dense = [np.asarray(w.dequantize()).reshape(like.shape) for w, like in zip(packed, (gate_up, down), strict=True)]
    packed, ids = [jax.device_put(w) for w in packed], np.where(ids == 1, E, ids).astype(np.int32)
    dense = [np.concatenate([w, np.zeros_like(w[:1])]) for w in dense]
    native.set_isa(isa)
    try:
        given = {"gate_up_bias_EJ": biases[0], "down_bias_ED": biases[1]} if T == 5 else {}
        got = experts(x, ids, weights, *packed, activation, gated="silu", **given)
        of_all = [np.concatenate([b, np.zeros_like(b[:1])]) if given else np.zeros((E + 1, b.shape[1])) for b in biases]
        wanted = every_expert(x, ids, weights, *dense, *of_all)
        np.testing.assert_allclose(got, wanted, atol=0.03 * np.abs(wanted).max())
    finally:
        native.set_isa(None)


def clamped(gate_up_MJ):
    """GPT-OSS's, of gates and then ups."""
    gate, up = jnp.split(gate_up_MJ, 2, axis=-1)
    gate, up = jnp.minimum(gate, 7.0), jnp.clip(up, -7.0, 7.0)
    return (up + 1.0) * gate * jax.nn.sigmoid(1.702 * gate)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
@pytest.mark.parametrize(("T", "E", "k", "D", "F"), [(1, 8, 2, 48, 32), (7, 4, 3, 64, 40), (130, 3, 1, 80, 16)])
@pytest.mark.parametrize("body", ["generic", "native", "xla"])
def test_blocks_around_any_activation(T, E, k, D, F, body, monkeypatch):
    """Products alone, where no kernel has the activation, or hidden values are no whole panels."""
    x, ids, weights, gate_up, down, *biases = arguments(T, E, k, D=D, F=F)
    packed = [eight_bits(np.asarray(w, np.float32).reshape(-1, w.shape[-1])) for w in (gate_up, down)]
    dense = [w.dequantize().reshape(like.shape) for w, like in zip(packed, (gate_up, down), strict=True)]
    ids = np.where(ids == 1, E, ids).astype(np.int32)  # one expert is another device's
    given = {"gate_up_bias_EJ": biases[0] * 20, "down_bias_ED": biases[1]}
    wanted = np.asarray(experts(x, ids, weights, *dense, clamped, **given))
    if body == "xla":
        monkeypatch.setattr(module.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    native.set_isa("generic" if body == "generic" else None)
    try:
        got = experts(x, ids, weights, *(jax.device_put(w) for w in packed), clamped, **given)
    finally:
        native.set_isa(None)
    np.testing.assert_allclose(got, wanted, atol=(1e-5 if body == "xla" else 0.02) * np.abs(wanted).max())


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_adapters_beside_blocks():
    """An adapter's change is added to a product in blocks as to a dense one."""
    T, E, R = 6, 4, 2
    x, ids, weights, gate_up, down, *_ = arguments(T, E, 2, D=64, F=32)
    packed = [jax.device_put(eight_bits(w.reshape(-1, w.shape[-1]))) for w in (gate_up, down)]
    dense = [w.dequantize().reshape(like.shape) for w, like in zip(packed, (gate_up, down), strict=True)]
    rng = np.random.default_rng(1)
    stacks = [
        LoraStack(*(jnp.asarray(rng.standard_normal((3, E * R, width)), jnp.float32) for width in w.shape[:0:-1]))
        for w in (gate_up, down)
    ]
    lora = ExpertAdapters(*stacks, jnp.asarray([0, 1, 2, 1, 0, 2]))
    got, wanted = (experts(x, ids, weights, *w, activation, gated="silu", lora=lora) for w in (packed, dense))
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())
    assert not np.allclose(wanted, experts(x, ids, weights, *dense, activation), rtol=0.1)


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_eight_bits_round_to_the_nearest():
    weight_OI = np.random.default_rng(0).standard_normal((40, 100)).astype(np.float32)
    weight_OI[3, 32:64] = 0
    error_OI = np.abs(eight_bits(weight_OI).dequantize() - weight_OI)
    peak_OG = np.abs(np.pad(weight_OI, ((0, 0), (0, 28)))).reshape(40, 4, 32).max(-1)
    assert (error_OI <= np.repeat(peak_OG, 32, 1)[:, :100] * 0.51 / 127 + 1e-7).all()


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_int8_native_without_some_experts():
    """Ids that are nobody's add nothing; experts without tokens are skipped."""
    x, ids, weights, rounded, dense, biases = int8_arguments(20, 6, 2)
    ids = np.where(ids < 3, ids, 6).astype(np.int32)
    got = experts(x, ids, weights, *(pack_experts(w) for w in rounded), activation, gated="silu")
    padded = [np.concatenate([a, np.zeros_like(a[:1])]) for a in dense]
    wanted = every_expert(x, ids, weights, *padded, *(np.zeros((7, b.shape[1]), np.float32) for b in biases))
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted).max())
    nobody = experts(x, np.full_like(ids, 6), weights, *(pack_experts(w) for w in rounded), activation, gated="silu")
    assert not np.asarray(nobody).any()


def test_what_cannot_be_packed():
    assert not can_pack((4, 24, 16), "silu")  # half a panel
    assert not can_pack((4, 32, 16), "gelu")  # the exact one is in no kernel
    assert not can_pack((4, 32, 16), None)
    dense = jnp.ones((2, 32, 16))
    assert pack_experts(dense) is dense
    assert isinstance(quantize(dense, "int8"), Int8Weight)


def test_int8_on_four_devices():
    command = [sys.executable, "-m", "tests.ops.experts_on_mesh"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    # Each device rounds its part of an activation by itself.
    assert float(done.stdout.splitlines()[-1]) < 0.02
