"""Products with block weights against GGUF's own decoder, at every instruction-set level this machine has."""

from __future__ import annotations

import dataclasses

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ops import native
from ops.linear import RmsNorm, embed, gated_mlp, linear, quantize, reference
from ops.linear.weights import block_pack, block_round
from ops.linear.weights.block_pack import GGUF, CodedRows
from ops.linear.weights.blocks import STEP, TABLES, BlockWeight, Form, Stretch

pytestmark = pytest.mark.skipif(not native.available(), reason=native.status())

KINDS = {name: number for number, (name, _) in GGUF.items()}
SHAPES = [(1, 64, 256), (2, 16, 512), (3, 37, 768), (5, 130, 1280), (49, 48, 256)]  # T, O, I


def stored(kind: str, O: int, I: int, seed: int = 0) -> tuple[CodedRows, np.ndarray]:
    """Rows of a type with random bits but sane scales, and what GGUF's decoder makes of them."""
    number, form = KINDS[kind], GGUF[KINDS[kind]][1]
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
    rng = np.random.default_rng((seed, number))
    blocks = rng.integers(0, 256, (O, I // block, size), np.uint8)
    halves = {"Q4_1": 2, "Q5_1": 2, "Q4_K": 2, "Q5_K": 2, "MXFP4": 0}.get(kind, 1)
    scales = (rng.uniform(0.5, 1.5, (O, I // block, 2)) * I**-0.5 / 64).astype(np.float16).view(np.uint8)
    at = size - 2 if kind == "Q6_K" else 0
    blocks[..., at : at + 2 * halves] = scales[..., : 2 * halves]
    if kind == "MXFP4":
        blocks[..., 0] = rng.integers(110, 124, blocks.shape[:-1])
    rows_RB = np.ascontiguousarray(blocks.reshape(O, -1))
    dense_OI = gguf.quants.dequantize(rows_RB, gguf.GGMLQuantizationType(number))
    return CodedRows(form, I, rows_RB, number), dense_OI


def packed(kind: str, O: int, I: int, seed: int = 0) -> tuple[BlockWeight, np.ndarray]:
    coded, dense_OI = stored(kind, O, I, seed)
    weight = block_pack.pack([coded], np.zeros(O, int), np.arange(O))
    return jax.device_put(weight), dense_OI


def rounded(x_TI: np.ndarray) -> np.ndarray:
    """Activations as the kernels see them: int8 with a scale for every 32 inputs."""
    x_TI = np.asarray(x_TI, np.float32)
    x_TShi = np.pad(x_TI, ((0, 0), (0, -x_TI.shape[1] % STEP))).reshape(len(x_TI), -1, 2, STEP // 2)
    most_TS, least_TS = np.maximum(x_TShi.max((-2, -1)), 0), np.maximum(-x_TShi.min((-2, -1)), 0)
    together_TS = np.abs(x_TShi).sum(-1).max(-1)
    scale_TS = np.maximum(np.maximum(most_TS, least_TS) / 127, np.minimum(most_TS, least_TS) / 112)
    scale_TS = np.float64(np.maximum(scale_TS, together_TS / 1008))
    scale_TS = np.where(scale_TS > 1e-30, np.where(most_TS > least_TS, -scale_TS, scale_TS), 1)[..., None, None]
    value_TShi = np.rint(x_TShi / scale_TS)
    assert value_TShi.min(initial=0) >= -127 and value_TShi.max(initial=0) <= 112
    assert np.abs(value_TShi).sum(-1).max(initial=0) < 1024
    return (value_TShi * scale_TS).reshape(len(x_TI), -1)[:, : x_TI.shape[1]]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((seed, *shape)).normal(size=shape) * scale, jnp.float32)


def at_each_level(run):
    try:
        for level in ("generic", "avx2", "vnni"):
            if native.set_isa(level) == level:
                yield level, np.asarray(run())
    finally:
        native.set_isa(None)


def assert_close(y_TO, wanted_TO, message=""):
    # An activation between two steps may round either way: a step times a weight, for a few of them.
    scale = np.abs(wanted_TO).max()
    np.testing.assert_allclose(y_TO, wanted_TO, atol=4e-3 * scale, err_msg=message)
    # But almost all rows have no such activation.
    other_T = (np.abs(y_TO - wanted_TO) > 2e-5 * scale).any(-1)
    assert other_T.sum() <= 1 + 0.1 * len(other_T), message


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_is_exact(kind):
    weight, dense_OI = packed(kind, 37, 768)
    np.testing.assert_array_equal(weight.dequantize(), dense_OI)
    ids = jnp.array([3, 0, 36, 17, 37, -1])
    for level, rows in at_each_level(lambda: jax.jit(embed)(weight, ids)):
        np.testing.assert_array_equal(rows[:4], dense_OI[np.array([3, 0, 36, 17])], err_msg=level)
        assert not rows[4:].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("T", "O", "I"), SHAPES)
def test_linear(kind, T, O, I):
    weight, dense_OI = packed(kind, O, I)
    x_TI = normal(T, I)
    run = jax.jit(linear)
    for level, y_TO in at_each_level(lambda: run(x_TI, weight)):
        assert_close(y_TO, reference.linear(rounded(x_TI), dense_OI), level)


def test_everything_around_it_and_several_forms():
    """As q, k and v of different types in one projection: rows of three tensors, in turn."""
    kinds, I = ("Q4_K", "Q6_K", "Q8_0"), 512
    coded, dense = zip(*(stored(kind, 32, I, seed) for seed, kind in enumerate(kinds)), strict=True)
    order = [(tensor, row) for half in (0, 16) for tensor in range(3) for row in range(half, half + 16)]
    tensor_R, row_R = (np.array(column) for column in zip(*order, strict=True))
    weight = jax.device_put(block_pack.pack(coded, tensor_R, row_R))
    dense_OI = np.stack([dense[tensor][row] for tensor, row in order])
    np.testing.assert_array_equal(weight.dequantize(), dense_OI)
    x_TI, bias_O, residual_TO = normal(5, I, scale=30.0), normal(96, seed=3), normal(5, 96, seed=4)
    norm = RmsNorm(normal(I, seed=5), 1e-5)
    run = jax.jit(lambda x: linear(x, weight, bias_O, norm=norm, residual_TO=residual_TO))
    normed_TI = reference.rms_norm(x_TI, norm.scale_I, norm.eps)
    wanted_TO = reference.linear(rounded(normed_TI), dense_OI, bias_O) + np.asarray(residual_TO)
    for level, y_TO in at_each_level(lambda: run(x_TI)):
        assert_close(y_TO, wanted_TO, level)


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize("T", [1, 5, 200])
def test_gated_mlp(T, activation):
    D, F = 256, 512
    (gate_up, up_OI), (down, down_OI) = packed("Q4_K", 2 * F, D), packed("Q6_K", D, F, seed=1)
    x_TD, residual_TD = normal(T, D, scale=3.0), normal(T, D, seed=2)
    run = jax.jit(lambda x: gated_mlp(x, gate_up, down, activation, residual_TD=residual_TD))
    gate, up = np.split(reference.linear(rounded(x_TD), up_OI), 2, axis=-1)
    hidden_TF = reference.gate(activation, gate) * up
    wanted_TD = reference.linear(rounded(hidden_TF), down_OI) + np.asarray(residual_TD)
    for level, y_TD in at_each_level(lambda: run(x_TD)):
        np.testing.assert_allclose(y_TD, wanted_TD, atol=1e-2 * np.abs(wanted_TD).max(), err_msg=level)


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_1", "Q8_0", "IQ4_NL"])
def test_a_row_is_the_same_alone_and_among_others(kind):
    weight, _ = packed(kind, 80, 768)
    x_TI, run = normal(64, 768), jax.jit(linear)
    for level, y_TO in at_each_level(lambda: run(x_TI, weight)):
        for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 13, 16, 24, 29, 48):
            native.set_isa(level)
            np.testing.assert_array_equal(run(x_TI[:count], weight), y_TO[:count], err_msg=f"{level}, {count} rows")


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "Q4_1", "Q4_0"])
def test_sums_stay_within_their_bytes(kind):
    """Activations as large as rounding lets them be, of either sign, times the largest and the smallest values that there are."""
    coded, _ = stored(kind, 48, 512)
    _, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(KINDS[kind])]
    blocks = coded.rows_RB.reshape(48, -1, size)
    values = {"Q4_K": slice(16, None), "Q6_K": slice(0, 192), "Q4_1": slice(4, None), "Q4_0": slice(2, None)}[kind]
    blocks[:16, :, values], blocks[16:32, :, values] = 0, 255
    dense_OI = gguf.quants.dequantize(coded.rows_RB, gguf.GGMLQuantizationType(KINDS[kind]))
    weight = jax.device_put(block_pack.pack([coded], np.zeros(48, int), np.arange(48)))
    rng = np.random.default_rng(2)
    x_TI = np.where(rng.random((26, 512)) < 0.5, 112, -127) * np.where(
        rng.random((26, 512)) < rng.random((26, 1)), 1, -1
    )
    x_TI[:4] = np.array([127, -127, 112, 0])[:, None]
    x_TI[4:8] = x_TI[8:12] * (np.arange(512) % 32 == 5)
    x_TI, run = jnp.asarray(x_TI, jnp.float32), jax.jit(linear)
    for level, y_TO in at_each_level(lambda: run(x_TI, weight)):
        assert_close(y_TO, reference.linear(rounded(x_TI), dense_OI), level)
        native.set_isa(level)
        for count in (1, 6, 13):
            np.testing.assert_array_equal(run(x_TI[:count], weight), y_TO[:count], err_msg=f"{level}, {count} rows")


@pytest.mark.parametrize("zeros", [(0, 3, 4), range(1, 40), range(0, 48, 2)])
def test_rows_of_zeros_between_others_change_no_bit_of_them(zeros):
    """Padding is not multiplied, in one span or in more than are counted."""
    weight, _ = packed("Q4_K", 80, 768)
    x_TI, run = normal(48, 768), jax.jit(linear)
    with_zeros_TI, rest = x_TI.at[np.array(zeros)].set(0.0), np.setdiff1d(np.arange(48), zeros)
    for level, y_TO in at_each_level(lambda: run(x_TI, weight)):
        native.set_isa(level)
        got_TO = np.asarray(run(with_zeros_TI, weight))
        np.testing.assert_array_equal(got_TO[rest], y_TO[rest], err_msg=level)
        assert not got_TO[np.array(zeros)].any()


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K", "IQ4_NL"])
def test_blocks_of_many_rows(kind):
    """So many rows and channels that a tile takes many of them: each is what it is alone."""
    weight, _ = packed(kind, 1040, 544 if kind == "IQ4_NL" else 768)
    x_TI, run = normal(400, weight.shape[1]), jax.jit(linear)
    y_TO = np.asarray(run(x_TI, weight))
    for rows in (slice(0, 5), slice(131, 136), slice(198, 203), slice(395, 400)):
        np.testing.assert_array_equal(run(x_TI[rows], weight), y_TO[rows])


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (Form(4, zero=8, block=128, scale="bfloat16"), "bfloat16"),
        (Form(4, block=64, scale="float16", offset="zero_point"), "float16"),
        (Form(4, zero=8, block=1024, scale="float32"), "float32"),
        (Form(8, zero=128, block=32, scale="float32", offset="float32"), "float32"),
        (Form(4, zero=1 << 15, block=64, scale="float32", table="nf4"), "float32"),
        (Form(4, zero=1 << 15, block=128, scale="float32", table="fp4"), "float32"),
    ],
)
@pytest.mark.parametrize("I", [1024, 1056])
def test_plain_values(form, dtype, I):
    """What AWQ, GPTQ, compressed-tensors and bitsandbytes are brought to; inputs that are no whole blocks."""
    import ml_dtypes

    O, G = 20, -(-I // form.block)
    rng = np.random.default_rng(1)
    values = rng.integers(0, 1 << form.bits, (O, I), np.uint8)
    scale = rng.uniform(0.5, 1.5, (O, G)).astype(getattr(ml_dtypes, dtype, dtype))
    offset = rng.integers(0, 16, (O, G), np.uint8) if form.offset == "zero_point" else None
    offset = rng.normal(size=(O, G)).astype(np.float32) if form.offset == "float32" else offset
    coded = CodedRows(form, I, values, scale_RG=scale, offset_RG=offset)
    weight = jax.device_put(block_pack.pack([coded], np.zeros(O, int), np.arange(O)))
    spread = [None if a is None else np.repeat(a.astype(np.float32), form.block, 1)[:, :I] for a in (scale, offset)]
    table = TABLES[form.table]
    whole = values.astype(np.float32) - form.zero if table is None else np.array(table, np.float32)[values]
    dense_OI = whole * spread[0]
    if offset is not None:
        dense_OI = dense_OI + (-spread[1] * spread[0] if form.offset == "zero_point" else spread[1])
    np.testing.assert_allclose(weight.dequantize(), dense_OI, rtol=1e-6, atol=1e-6)
    for level, rows in at_each_level(lambda: weight.rows(jnp.array([19, 0]))):
        np.testing.assert_allclose(rows, dense_OI[[19, 0]], rtol=1e-6, atol=1e-6, err_msg=level)
    for T in (1, 7, 26):
        x_TI = normal(T, I)
        for level, y_TO in at_each_level(lambda x_TI=x_TI: jax.jit(linear)(x_TI, weight)):
            assert_close(y_TO, reference.linear(rounded(x_TI), dense_OI), level)


def test_sorted_inputs():
    """As GPTQ with `desc_act` stores them: a value's input is said, and norms and gated blocks follow."""
    (four, dense_OI), order = stored("Q4_0", 512, 256), np.random.default_rng(3).permutation(256)
    (down, down_OI), inverse = packed("Q6_K", 256, 256, seed=1), np.argsort(order)
    coded = dataclasses.replace(four, order_I=order)
    weight = jax.device_put(block_pack.pack([coded], np.zeros(512, int), np.arange(512)))
    wanted_OI = dense_OI[:, inverse]
    np.testing.assert_array_equal(weight.dequantize(), wanted_OI)
    np.testing.assert_array_equal(weight.rows(jnp.array([3, 511])), wanted_OI[[3, 511]])
    x_TI, norm = normal(3, 256), RmsNorm(normal(256, seed=5), 1e-5)
    normed_TI = reference.rms_norm(x_TI, norm.scale_I, norm.eps)
    gate, up = np.split(reference.linear(normed_TI, wanted_OI), 2, axis=-1)
    by_order = dataclasses.replace(weight, shape=(256, 256), stretches=(Stretch(weight.stretches[0].form, 16, 0),))
    hidden_TF = reference.gate("silu", gate) * up
    wanted = [
        reference.linear(x, w) for x, w in ((normed_TI, wanted_OI), (hidden_TF, down_OI), (hidden_TF, wanted_OI[:256]))
    ]
    made = jax.jit(
        lambda x: (
            linear(x, weight, norm=norm),
            *(gated_mlp(x, weight, second, "silu", norm=norm) for second in (down, by_order)),
        )
    )
    for level, y in at_each_level(lambda: np.concatenate(made(x_TI), axis=1)):
        for got, right in zip(np.split(y, (512, 768), axis=1), wanted, strict=True):
            np.testing.assert_allclose(got, right, atol=2e-2 * np.abs(right).max(), err_msg=level)


def test_what_cannot_be_packed_is_said():
    (four, _), (six, _) = stored("Q4_K", 16, 256), stored("Q6_K", 16, 256)
    mixed = np.arange(16) % 2
    with pytest.raises(ValueError, match="different forms"):
        block_pack.pack([four, six], mixed, np.arange(16))
    broken = CodedRows(four.form, 256, four.rows_RB.copy(), four.kind)
    broken.rows_RB[3, :2] = (0, 0x7C)  # infinity
    with pytest.raises(ValueError, match="finite"):
        block_pack.pack([broken], np.zeros(16, int), np.arange(16))
    with pytest.raises(ValueError, match="rows 1 to 16 are asked for, and there are 16"):
        block_pack.pack([four], np.zeros(16, int), np.arange(1, 17))
    with pytest.raises(ValueError, match="not 16 rows of 512 inputs"):
        block_pack.pack([dataclasses.replace(four, inputs=512)], np.zeros(16, int), np.arange(16))
    with pytest.raises(ValueError, match="every 48 inputs"):
        Form(4, block=48)
    with pytest.raises(ValueError, match="no power of two"):
        Form(4, zero=12)
    sorted_in = [dataclasses.replace(four, order_I=np.roll(np.arange(256), shift)) for shift in (1, 2)]
    with pytest.raises(ValueError, match="sorted differently"):
        block_pack.pack(sorted_in, np.arange(32) // 16, np.arange(32) % 16)


@pytest.mark.parametrize("I", [64, 50])
def test_some_rows_get_six_bits(I):
    """The last 16 of every 48, which a gate's or a head's rows may be: a fourth of the error, in panels of their own."""
    weight_OI, finer = np.asarray(normal(96, I)), (48, 32)
    weight = block_round.four_bits(weight_OI, finer=finer)
    assert [(stretch.form.bits, stretch.panels) for stretch in weight.stretches] == [(4, 2), (6, 1), (4, 2), (6, 1)]
    assert jax.eval_shape(lambda: jax.device_put(weight)) == block_round.four_bits_like((96, I), finer)
    dense_OI = np.asarray(weight.dequantize())
    error_O = np.sqrt(np.mean((dense_OI - weight_OI) ** 2, axis=1))
    is_six = np.arange(96) % 48 >= 32
    assert error_O[is_six].mean() < error_O[~is_six].mean() / 3
    x_TI, on_device = normal(5, I, seed=1), jax.device_put(weight)
    for level, y_TO in at_each_level(lambda: jax.jit(linear)(x_TI, on_device)):
        wanted_TO = reference.linear(x_TI, dense_OI)
        np.testing.assert_allclose(y_TO, wanted_TO, atol=0.02 * np.abs(wanted_TO).max(), err_msg=level)
    assert not np.asarray(block_round.four_bits(np.zeros((16, 32)), finer=(1, 0)).dequantize()).any()


@pytest.mark.parametrize("I", [64, 50, 608])  # rotated, and no whole blocks of any kind
def test_rounding_to_four_bits(I):
    """Scales and offsets of six bits for every 32 inputs: on normal weights the error is a fourteenth of them."""
    weight_OI = normal(40, I)
    weight = quantize(weight_OI, "int4")
    assert isinstance(weight, BlockWeight) and weight.rotated == (I % 64 == 0) and weight.shape == (40, I)
    assert jax.eval_shape(lambda: weight) == block_round.four_bits_like((40, I)), "what plans are made with"
    dense_OI = np.asarray(weight.dequantize())
    error = np.sqrt(np.mean((dense_OI - np.asarray(weight_OI)) ** 2))
    assert 0.03 < error < 0.08
    x_TI, ids = normal(5, I, seed=1), jnp.array([39, 2])
    for level, y_TO in at_each_level(lambda: jax.jit(linear)(x_TI, weight)):
        wanted_TO = reference.linear(x_TI, dense_OI)
        np.testing.assert_allclose(y_TO, wanted_TO, atol=0.02 * np.abs(wanted_TO).max(), err_msg=level)
    np.testing.assert_allclose(embed(weight, ids), dense_OI[np.array([39, 2])], atol=1e-5)
    assert not np.asarray(quantize(jnp.zeros((16, 32)), "int4").dequantize()).any()
