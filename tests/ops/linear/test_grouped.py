"""Weights in groups, for accelerators: each body of the product against the numbers that the weight stands for."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops import native
from ops.experts import experts
from ops.linear import embed, linear
from ops.linear.kernels.coding import Coding
from ops.linear.weights.block_pack import GGUF, SIZES, CodedRows, pack
from ops.linear.weights.block_round import four_bits
from ops.linear.weights.group_pack import FLOATS, Rows, as_float8, place, rounded, rows_of_blocks
from ops.linear.weights.grouped import BODIES, use_body

RNG = np.random.default_rng(0)
E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def rows_of(kind: str, O: int, I: int, group: int) -> Rows:
    scale = (RNG.random((O, I // group)) + 0.5).astype(np.float32)
    offset = RNG.standard_normal(scale.shape).astype(np.float32)
    codes = RNG.integers(0, 16, (O, I)).astype(np.uint8)
    if kind == "four":
        return Rows(codes, scale, None, 4, zero=8)
    if kind == "four with offsets":
        return Rows(codes, scale, offset, 4)
    if kind == "table":
        return Rows(codes, scale, None, 4, table=E2M1)
    if kind == "eight":
        return Rows(RNG.integers(-128, 128, (O, I)).astype(np.int8), scale, offset, 8, zero=3)
    return Rows(RNG.standard_normal((O, I)).astype(FLOATS[0]), scale, None, 8)


def spelled_out(rows: Rows) -> np.ndarray:
    group = rows.values_OI.shape[1] // rows.scale_OG.shape[1]
    values = rows.values_OI.astype(np.float32) - rows.zero
    values = values if rows.table is None else np.array(rows.table, np.float32)[rows.values_OI]
    offset = 0.0 if rows.offset_OG is None else np.repeat(rows.offset_OG, group, 1)
    return values * np.repeat(rows.scale_OG, group, 1) + offset


CASES = [
    ("four", 96, 256, 32), ("four with offsets", 200, 512, 128), ("table", 64, 96, 16), ("table", 130, 2880, 32),
    ("eight", 48, 512, 16), ("eight", 33, 320, 320), ("float8", 128, 384, 128), ("float8", 40, 4096, 4096), ("four", 17, 64, 64),
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize(("kind", "O", "I", "group"), CASES)
def test_products(body, kind, O, I, group):
    rows = rows_of(kind, O, I, group)
    made, wanted = rows.weight((O, I), "cpu"), spelled_out(rows)
    assert made is not None and made.shape == (O, I)
    np.testing.assert_array_equal(made.dequantize(), wanted)
    with use_body(body):
        for T in (1, 5, 70):
            x_TI = RNG.standard_normal((T, I)).astype(np.float32)
            want = x_TI.astype(np.float64) @ wanted.astype(np.float64).T
            traced = jax.jit(lambda x, w: linear(x, w))  # noqa: PLW0108 (a trace of its own for each body)
            got = traced(x_TI, jax.device_put(made))
            np.testing.assert_allclose(got, want, atol=3e-6 * np.abs(want).max())
            narrow = linear(jnp.asarray(x_TI, jnp.bfloat16), jax.device_put(made), out_dtype=jnp.float32)
            np.testing.assert_allclose(narrow, want, atol=2e-2 * np.abs(want).max())


def test_kernels_take_what_checkpoints_have():
    """All but rows of inputs that are no whole runs of a few; those are plain XLA's."""
    from ops.linear.kernels import pallas_gpu, pallas_tpu

    for I, O in ((4096, 12288), (8960, 1536), (14336, 4096), (2880, 5760), (18944, 3584), (576, 1536), (7168, 2112)):
        for coding in (Coding(32, 32), Coding(16, 16, table=E2M1), Coding(16), Coding(32), Coding(I)):
            assert pallas_gpu.supports(I, O, coding) and pallas_tpu.supports(I, O, coding), (I, O, coding)


@pytest.mark.parametrize("number", GGUF)
@pytest.mark.skipif(not native.available(), reason=native.status())
def test_ggufs_blocks_keep_their_numbers(number):
    (name, form), (block, size), (O, I) = GGUF[number], SIZES[number], (80, 512)
    raw = RNG.integers(0, 256, (O, I // block, size), np.uint8)
    halves = (RNG.random((O, I // block, 2)) + 0.1).astype(np.float16).view(np.uint8).reshape(O, -1, 4)
    if name == "MXFP4":
        raw[..., 0] = RNG.integers(115, 130, raw.shape[:2])
    elif name == "Q6_K":
        raw[..., -2:] = halves[..., :2]
    else:
        raw[..., :2] = halves[..., :2]
        if name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K"):
            raw[..., 2:4] = halves[..., 2:]
    blocks = pack([CodedRows(form, I, raw.reshape(O, -1), number)], np.zeros(O, np.int64), np.arange(O))
    rows = rows_of_blocks(blocks)
    assert rows is not None and rows.bits == (4 if form.bits == 4 else 8)
    made = rows.weight((O, I), "cpu")
    assert made is not None
    np.testing.assert_array_equal(made.dequantize(), blocks.dequantize())


@pytest.mark.skipif(not native.available(), reason=native.status())
def test_stretches_of_several_forms():
    """As projections of different types have that one product takes together: as bytes, groups as small as the smallest."""
    four, six = GGUF[2][1], GGUF[14][1]
    tensors = [
        CodedRows(four, 256, RNG.integers(0, 60, (32, 8 * 18)).astype(np.uint8), 2),
        CodedRows(six, 256, RNG.integers(0, 60, (16, 210)).astype(np.uint8), 14),
    ]
    tensor_R = np.repeat([0, 1], [32, 16])
    blocks = pack(tensors, tensor_R, np.concatenate([np.arange(32), np.arange(16)]))
    rows = rows_of_blocks(blocks)
    assert rows is not None and rows.bits == 8 and rows.scale_OG.shape == (48, 16)
    made = rows.weight((48, 256), "cpu")
    assert made is not None
    np.testing.assert_array_equal(made.dequantize(), blocks.dequantize())


def test_four_bit_floats_become_float8_exactly():
    rows = rows_of("table", 48, 256, 32)
    wide = as_float8(rows)
    assert wide.values_OI.dtype == FLOATS[0] and wide.bits == 8
    np.testing.assert_array_equal(spelled_out(wide), spelled_out(rows))
    assert as_float8(wide) is wide
    assert as_float8(rows_of("four", 16, 64, 32)).bits == 4


def test_rounding():
    """Four bits at five a weight as good as those of a CPU at four and a half; a tenth of a percent in eight."""
    dense_OI = RNG.standard_normal((64, 576)).astype(np.float32)

    def error(made) -> float:
        return float(((np.asarray(made.dequantize()) - dense_OI) ** 2).sum() / (dense_OI**2).sum())

    found = {bits: rounded(dense_OI, bits) for bits in (4, 8)}
    made = {bits: rows.weight(dense_OI.shape, "cpu") for bits, rows in found.items() if rows is not None}
    assert made[4] is not None and made[8] is not None
    assert made[4].scale.dtype == made[4].offset.dtype == jnp.bfloat16 and made[4].rotated
    assert error(made[8]) < 1e-4
    assert error(made[4]) < 6.2e-3
    if native.available():
        assert error(made[4]) < 1.1 * error(four_bits(dense_OI))
    x_TI = RNG.standard_normal((3, 576)).astype(np.float32)
    dense_made = np.asarray(made[4].dequantize())
    np.testing.assert_allclose(linear(x_TI, jax.device_put(made[4])), x_TI @ dense_made.T, atol=1e-4)
    assert rounded(np.zeros((4, 40), np.float32), 4) is None, "no whole groups"


@pytest.mark.parametrize(("kind", "O", "I", "group"), CASES[:5])
def test_rows(kind, O, I, group):
    rows = rows_of(kind, O, I, group)
    made = jax.device_put(rows.weight((O, I), "cpu"))
    ids = np.array([[0, O - 1, 5], [-1, O, 5]])
    wanted = np.where(((ids >= 0) & (ids < O))[..., None], spelled_out(rows)[np.clip(ids, 0, O - 1)], 0)
    np.testing.assert_array_equal(embed(made, jnp.asarray(ids)), wanted)


def test_sorted_inputs():
    rows, order_I = rows_of("four", 32, 128, 32), RNG.permutation(128)
    made = jax.device_put(dataclasses.replace(rows, order_I=order_I).weight((32, 128), "cpu"))
    wanted = np.empty((32, 128), np.float32)
    wanted[:, order_I] = spelled_out(rows)
    np.testing.assert_array_equal(made.dequantize(), wanted)
    x_TI = RNG.standard_normal((4, 128)).astype(np.float32)
    np.testing.assert_allclose(linear(x_TI, made), x_TI @ wanted.T, atol=1e-4)
    assert dataclasses.replace(rows, order_I=order_I).weight((32, 128), "cpu", cuts=2) is None


def test_experts():
    E, D, F, T = 4, 64, 32, 7
    gate_up, down = rows_of("four", E * 2 * F, D, 32), rows_of("eight", E * D, F, 16)
    stacks = gate_up.weight((E, 2 * F, D), "cpu"), down.weight((E, D, F), "cpu")
    dense_stacks = [spelled_out(rows).reshape(shape) for rows, shape in ((gate_up, (E, 2 * F, D)), (down, (E, D, F)))]
    x_TD = RNG.standard_normal((T, D)).astype(np.float32)
    ids_Tk = RNG.integers(0, E, (T, 2)).astype(np.int32)
    weights_Tk = RNG.random((T, 2)).astype(np.float32)

    def activation(h_MJ: jax.Array) -> jax.Array:
        return jax.nn.silu(h_MJ[:, :F]) * h_MJ[:, F:]

    def run(gate_up, down):
        return experts(x_TD, ids_Tk, weights_Tk, gate_up, down, activation, gated="silu")

    want = np.asarray(run(*map(jnp.asarray, dense_stacks)))
    np.testing.assert_allclose(run(*map(jax.device_put, stacks)), want, atol=1e-4 * np.abs(want).max())


def test_tpus_have_whole_tiles_of_channels():
    """What XLA would keep turned round and turn back before each product; nobody sees the channels that are more."""
    rows, x_TI = rows_of("four with offsets", 200, 512, 128), RNG.standard_normal((5, 512)).astype(np.float32)
    wanted = spelled_out(rows)
    for sharding in (None, NamedSharding(Mesh(jax.devices()[:1], ("model",)), PartitionSpec("model", None))):
        made = place(rows.weight((200, 512), "tpu"), sharding)
        assert made.values.shape == (256, 256) and made.shape == (200, 512)
        np.testing.assert_array_equal(made.dequantize(), wanted)
        np.testing.assert_array_equal(
            embed(made, jnp.asarray([199, 200, 255])), np.stack([wanted[199], *np.zeros((2, 512))])
        )
        made = dataclasses.replace(made, platform="cpu")  # so that kernels are interpreted
        for body in BODIES:
            with use_body(body):
                got = linear(x_TI, made)
            assert got.shape == (5, 200)
            np.testing.assert_allclose(got, x_TI @ wanted.T, atol=1e-3)
    stack = place(rows_of("eight", 3 * 40, 64, 32).weight((3, 40, 64), "tpu"), None)
    assert stack.values.shape == (3, 64, 128) and stack.shape == (3, 40, 64) and stack.dequantize().shape == (3, 40, 64)
    x_MI, sizes_E = RNG.standard_normal((6, 64)).astype(np.float32), jnp.asarray([1, 3, 2])
    expert_M = np.repeat(np.arange(3), sizes_E)
    want = np.einsum("mi,moi->mo", x_MI, np.asarray(stack.dequantize())[expert_M])
    np.testing.assert_allclose(stack.grouped(x_MI, sizes_E, expert_M), want, atol=1e-2)
    np.testing.assert_allclose(
        dataclasses.replace(stack, platform="cpu").of_expert(jnp.asarray(1), x_MI)[1], want[1], atol=1e-2
    )
    whole = place(rows_of("eight", 128, 64, 32).weight((128, 64), "tpu"), None)
    assert whole.outputs is None and place(rows.weight((200, 512), "gpu"), None).outputs is None


def test_groups_too_small_to_compute_with():
    assert rows_of("four", 8, 64, 8).weight((8, 64), "cpu") is None
    assert rows_of("four", 8, 64, 32).weight((8, 64), "cpu", cuts=8) is None
    assert rows_of("table", 8, 48, 48).weight((8, 48), "cpu") is None, "no two halves of a power of two"
    odd = rows_of("four", 8, 48, 48).weight((8, 48), "cpu")
    assert odd is not None and odd.coding.half == 0, "a byte each"


def test_what_is_asked_for():
    with pytest.raises(ValueError, match="no body"), use_body("cuda"):
        pass
    made = rows_of("four", 16, 64, 32).weight((16, 64), "tpu")
    assert made is not None and made._body(64) == "pallas_tpu"
    with use_body("xla"):
        assert made._body(64) == "xla"
