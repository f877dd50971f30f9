"""The schemes of models/loading/packed beyond those of test_quantized.py, with packers written from the formats' descriptions."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.quantized import METHODS, open_quantized, refuse_packed
from tests.models.loading.test_quantized import (
    GROUP,
    NF4,
    RNG,
    I,
    O,
    bitstream,
    check,
    compressed,
    float4,
    open_one,
    pack,
)

FLOAT8 = ml_dtypes.float8_e4m3fn


def halves(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two values of four bits in a byte."""
    return ((low & 15) | (high & 15) << 4).astype(np.uint8)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Neighbouring columns in a byte, the first in its lower half."""
    return halves(codes[..., ::2], codes[..., 1::2])


def of(codes: np.ndarray) -> np.ndarray:
    """The values of four-bit floats."""
    return np.vectorize(float4)(codes).astype(np.float32)


def columns(scale: np.ndarray, size: int) -> np.ndarray:
    return np.repeat(np.asarray(scale, np.float32), size, axis=-1)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("experts", [False, True])
def test_mlx(tmp_path, bits, experts):
    """Affine: w = q * scale + bias; uneven widths run on from word to word."""
    lead, group = ((3,) if experts else ()), 32
    q = RNG.integers(0, 1 << bits, (*lead, O, I))
    scale, bias = (RNG.standard_normal((*lead, O, I // group)).astype(np.float16) for _ in range(2))
    words = bitstream(q.reshape(-1, I), bits).view(np.uint32).reshape(*lead, O, -1)
    arrays = {"a.weight": words, "a.scales": scale, "a.biases": bias}
    wanted = q * columns(scale, group) + columns(bias, group)
    assert check(open_one(tmp_path, arrays, {"group_size": group, "bits": bits}), wanted)


def test_mlx_layers_may_differ(tmp_path):
    q, r = RNG.integers(0, 16, (O, I)), RNG.integers(0, 256, (O, I))
    ones = {
        f"{name}.{part}": np.ones((O, I // group), np.float16)
        for name, group in (("a", 64), ("b", 32))
        for part in ("scales", "biases")
    }
    arrays = {
        "a.weight": pack(q).view(np.uint32),
        "b.weight": pack(r, 8).view(np.uint32),
        "c.weight": np.ones((O, I), np.float16),
    }
    config = {"group_size": 64, "bits": 4, "b": {"group_size": 32, "bits": 8}, "c": False}
    checkpoint = open_one(tmp_path, arrays | ones, config)
    for name, values in (("a", q + 1), ("b", r + 1), ("c", np.ones((O, I)))):
        np.testing.assert_array_equal(checkpoint.read(f"{name}.weight"), values)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_mlx_small_floats(tmp_path, mode):
    codes, size = RNG.integers(0, 16, (O, I)), 16 if mode == "nvfp4" else 32
    exponent = RNG.integers(120, 134, (O, I // size)).astype(np.uint8)
    scale = np.ldexp(1.0, exponent.astype(int) - 127)
    words, dense = nibbles(codes).view(np.uint32), of(codes)
    if mode == "nvfp4":
        stored = (RNG.random((O, I // size)) * 8 + 0.5).astype(FLOAT8)
        exponent, scale = stored.view(np.uint8), stored.astype(np.float32)
    if mode == "mxfp8":
        values = RNG.standard_normal((O, I)).astype(FLOAT8)
        words, dense = values.view(np.uint32), values.astype(np.float32)
    arrays = {"a.weight": words, "a.scales": exponent}
    found = check(
        open_one(tmp_path, arrays, {"group_size": size, "bits": 4, "mode": mode}), dense * columns(scale, size)
    )
    assert (found is None) == (mode == "mxfp8")


@pytest.mark.parametrize("algo", ["NVFP4", "MXFP4"])
def test_modelopt_four_bit_floats(tmp_path, algo):
    codes, size = RNG.integers(0, 16, (O, I)), 16 if algo == "NVFP4" else 32
    arrays = {"a.weight": nibbles(codes), "a.input_scale": np.ones((), np.float32)}
    if algo == "NVFP4":
        scale = (RNG.random((O, I // size)) * 200 + 1).astype(FLOAT8)
        arrays |= {"a.weight_scale": scale, "a.weight_scale_2": np.float32(0.037)[None][0:1].reshape(())}
        wanted = of(codes) * columns(scale.astype(np.float32), size) * np.float32(0.037)
    else:
        exponent = RNG.integers(120, 134, (O, I // size)).astype(np.uint8)
        arrays["a.weight_scale"] = exponent
        wanted = of(codes) * columns(np.ldexp(1.0, exponent.astype(int) - 127), size)
    assert check(open_one(tmp_path, arrays, {"quant_method": "modelopt", "quant_algo": algo}), wanted)


def test_modelopt_mixed(tmp_path):
    """NVFP4, float8 and dense layers beside each other, scales of the cache apart."""
    codes, q = RNG.integers(0, 16, (O, I)), RNG.standard_normal((O, I)).astype(FLOAT8)
    scale, dense = (RNG.random((O, I // 16)) * 4 + 1).astype(FLOAT8), RNG.standard_normal((O, I)).astype(np.float32)
    arrays = {
        "a.weight": nibbles(codes),
        "a.weight_scale": scale,
        "a.weight_scale_2": np.array(0.5, np.float32),
        "b.weight": q,
        "b.weight_scale": np.array(0.25, np.float32),
        "b.k_scale": np.array(1.0, np.float32),
        "c.weight": dense,
    }
    checkpoint = open_one(tmp_path, arrays, {"quant_algo": "MIXED_PRECISION"})
    assert sorted(checkpoint.own_names) == ["a.weight", "b.weight", "c.weight"]
    np.testing.assert_allclose(checkpoint.read("a.weight"), of(codes) * columns(scale.astype(np.float32), 16) * 0.5)
    np.testing.assert_allclose(checkpoint.read("b.weight"), q.astype(np.float32) * 0.25)
    np.testing.assert_array_equal(checkpoint.read("c.weight"), dense)


def test_modelopt_awq(tmp_path):
    """Two outputs in a byte; inputs were to be multiplied by `pre_quant_scale` before the product."""
    q, scale = RNG.integers(-8, 8, (O, I)), RNG.random((O, I // GROUP)).astype(np.float32)
    smooth = RNG.random(I).astype(np.float32)
    arrays = {"a.weight": halves(q[::2], q[1::2]), "a.weight_scale": scale, "a.pre_quant_scale": smooth}
    wanted = q * columns(scale, GROUP) * smooth
    check(
        open_one(tmp_path, arrays, {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": GROUP}), wanted
    )


def test_modelopt_float8_in_blocks(tmp_path):
    q, scale = RNG.standard_normal((O, I)).astype(FLOAT8), RNG.random((4, 1, 2, 1)).astype(np.float32)
    wanted = q.astype(np.float32) * np.repeat(np.repeat(scale[:, 0, :, 0], 8, 0), 32, 1)
    check(open_one(tmp_path, {"a.weight": q, "a.weight_scale": scale}, {"quant_algo": "FP8_PB_WO"}), wanted)


def shuffled(values: np.ndarray) -> np.ndarray:
    """Eight columns in an int32, in AWQ's and Quark's order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return pack((values & 15).reshape(len(values), -1, 8)[:, :, order].reshape(values.shape))


@pytest.mark.parametrize("dtype", ["int4", "uint4"])
@pytest.mark.parametrize("qscheme", ["per_group", "per_channel"])
@pytest.mark.parametrize("method", ["reorder", "order"])
def test_quark_four_bit_integers(tmp_path, dtype, qscheme, method):
    low = -8 if dtype == "int4" else 0
    q, groups = RNG.integers(low, low + 16, (O, I)), I // GROUP if qscheme == "per_group" else 1
    zero, scale = RNG.integers(low, low + 16, (O, groups)), RNG.random((O, groups)).astype(np.float32)
    packed = shuffled if method == "reorder" else lambda values: pack(values & 15)
    if qscheme == "per_group":
        arrays = {"a.weight": packed(q.T), "a.weight_scale": scale.T.copy(), "a.weight_zero_point": packed(zero.T)}
    else:
        arrays = {"a.weight": packed(q), "a.weight_scale": scale[:, 0].copy(), "a.weight_zero_point": packed(zero.T)[0]}
    said = {"weight": {"dtype": dtype, "qscheme": qscheme, "group_size": GROUP, "ch_axis": 1}}
    config = {"quant_method": "quark", "global_quant_config": said, "export": {"pack_method": method}}
    size = I // groups
    check(open_one(tmp_path, arrays, config), (q - columns(zero, size)) * columns(scale, size))


def test_quark_layers_may_differ(tmp_path):
    """A layer of int8 groups, one of float8, one of MXFP4."""
    q, f = RNG.integers(-127, 128, (O, I)).astype(np.int8), RNG.standard_normal((O, I)).astype(FLOAT8)
    scale, codes = RNG.random((O, I // GROUP)).astype(np.float32), RNG.integers(0, 16, (O, I))
    exponent = RNG.integers(120, 134, (O, I // 32)).astype(np.uint8)
    arrays = {
        "a.weight": q.T.copy(),
        "a.weight_scale": scale.T.copy(),
        "b.weight": f,
        "b.weight_scale": np.array(0.5, np.float32),
    }
    arrays |= {"c.weight": nibbles(codes), "c.weight_scale": exponent}
    said = {
        "a": {"weight": {"dtype": "int8", "qscheme": "per_group"}},
        "c*": {"weight": {"dtype": "fp4", "qscheme": "per_group"}},
    }
    config = {
        "quant_method": "quark",
        "global_quant_config": {"weight": {"dtype": "fp8_e4m3"}},
        "layer_quant_config": said,
    }
    checkpoint = open_one(tmp_path, arrays, config)
    np.testing.assert_allclose(checkpoint.read("a.weight"), q * columns(scale, GROUP), rtol=1e-6)
    np.testing.assert_allclose(checkpoint.read("b.weight"), f.astype(np.float32) * 0.5)
    np.testing.assert_allclose(
        checkpoint.read("c.weight"), of(codes) * columns(np.ldexp(1.0, exponent.astype(int) - 127), 32)
    )


@pytest.mark.parametrize(
    ("packing", "less"),
    [("auto_round", 0), ("auto_round:gptqmodel", 0), ("auto_round:auto_gptq", 1), ("auto_round:auto_awq", 0)],
)
def test_auto_round(tmp_path, packing, less):
    """GPTQ's packing with zero points as they are or less one, or AWQ's; no g_idx."""
    q, zero = RNG.integers(0, 16, (I, O)), RNG.integers(1, 16, (I // GROUP, O))
    scale = RNG.random((I // GROUP, O)).astype(np.float16)
    arrays = {"a.qweight": np.ascontiguousarray(pack(q.T).T), "a.qzeros": pack(zero - less), "a.scales": scale}
    if packing.endswith("awq"):
        arrays |= {"a.qweight": shuffled(q), "a.qzeros": shuffled(zero)}
    config = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": packing}
    wanted = (q - np.repeat(zero, GROUP, 0)) * np.repeat(scale.astype(np.float32), GROUP, 0)
    check(open_one(tmp_path, arrays, config), wanted.T)


def test_auto_round_layers_of_other_widths(tmp_path):
    q, zero = RNG.integers(0, 256, (I, O)), RNG.integers(0, 256, (I // GROUP, O))
    arrays = {"a.qweight": np.ascontiguousarray(pack(q.T, 8).T), "a.qzeros": pack(zero, 8)}
    arrays["a.scales"] = np.ones(zero.shape, np.float16)
    config = {"quant_method": "auto-round", "bits": 4, "group_size": GROUP, "packing_format": "auto_round"}
    check(open_one(tmp_path, arrays, config), (q - np.repeat(zero, GROUP, 0)).T.astype(np.float32))


@pytest.mark.parametrize("method", ["fbgemm_fp8", "w8a8_int8", "blockwise_int8", "compressed-tensors"])
def test_eight_bits_by_row_and_block(tmp_path, method):
    blocks = method == "blockwise_int8"
    scale = RNG.random((2, 4) if blocks else (O, 1)).astype(np.float32)
    q = RNG.standard_normal((20, 60)) * 20 if blocks else RNG.standard_normal((O, I)) * 20
    q = q.astype(np.int8) if "int8" in method else q.astype(FLOAT8)
    arrays = {"a.weight": q, "a.weight_scale_inv" if blocks else "a.weight_scale": scale}
    spread = np.repeat(np.repeat(scale, 16, 0)[:20], 16, 1)[:, :60] if blocks else scale
    check(
        open_one(tmp_path, arrays, {"quant_method": method, "weight_block_size": [16, 16] if blocks else None}),
        q.astype(np.float32) * spread,
    )


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("zeros", [False, True])
def test_compressed_tensors_packed_by_tensor(tmp_path, shape, zeros):
    q, scale = RNG.integers(-128, 128, (O, I)), np.asarray(RNG.random(shape), np.float32)
    arrays = {
        "a.weight_packed": pack(q + 128, 8),
        "a.weight_scale": scale,
        "a.weight_shape": np.array([O, I], np.int64),
    }
    if zeros:
        arrays["a.weight_zero_point"] = np.full(shape, 3, np.int8)
    wanted = (q - 3 * zeros) * scale.reshape(-1)[0]
    check(open_one(tmp_path, arrays, compressed(8, strategy="tensor")), wanted)


def test_compressed_tensors_six_bit_floats(tmp_path):
    """E2M3: a sign, two bits of exponent with an offset of 1, three of mantissa."""
    codes, exponent = RNG.integers(0, 64, (O, I)), RNG.integers(120, 134, (O, I // 32)).astype(np.uint8)
    e, m = codes >> 3 & 3, codes & 7
    dense = np.where(codes & 32, -1, 1) * np.where(e == 0, m / 8, 2.0 ** (e - 1) * (1 + m / 8))
    arrays = {"a.weight_packed": bitstream(codes, 6).view(np.uint8), "a.weight_scale": exponent}
    wanted = dense * columns(np.ldexp(1.0, exponent.astype(int) - 127), 32)
    check(open_one(tmp_path, arrays, compressed(6, type="float", group_size=32)), wanted)


@pytest.mark.parametrize("storage", [ml_dtypes.bfloat16, np.float32, np.float16, np.uint8])
def test_bitsandbytes_in_other_storage(tmp_path, storage):
    """What is to be sharded beside floats is kept as floats: the same bytes."""
    codes = RNG.integers(0, 16, O * I)
    absmax = RNG.random(O * I // 64).astype(np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [O, I]}
    stored = (codes[::2] << 4 | codes[1::2]).astype(np.uint8).view(storage)
    arrays = {"a.weight": stored[:, None], "a.weight.quant_map": NF4, "a.weight.absmax": absmax}
    arrays["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    wanted = (NF4[codes] * np.repeat(absmax, 64)).reshape(O, I)
    check(open_one(tmp_path, arrays, {"quant_method": "bitsandbytes", "load_in_4bit": True}), wanted)


def test_float8_experts_in_one_tensor(tmp_path):
    """transformers 5's float8 experts: blocks of each expert's matrix."""
    q, scale = RNG.standard_normal((3, 32, 64)).astype(FLOAT8), RNG.random((3, 2, 4)).astype(np.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    wanted = q.astype(np.float32) * np.repeat(np.repeat(scale, 16, 1), 16, 2)
    config = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    check(open_one(tmp_path, {name: q, f"{name}_scale_inv": scale}, config), wanted, name)


def open_torchao(tmp_path, kind, arrays, **data):
    about = {"_type": kind, "_data": data, "_tensor_data_names": list(arrays)}
    metadata = {"a.weight": json.dumps(about), "tensor_names": '["a.weight"]'}
    save_file({f"a._weight_{name}": array for name, array in arrays.items()}, tmp_path / "model.safetensors", metadata)
    return open_quantized(SafetensorsCheckpoint(tmp_path), {"quant_method": "torchao"})


@pytest.mark.parametrize("kind", ["Float8Tensor", "Int8Tensor", "IntxUnpackedToInt8Tensor"])
def test_torchao_eight_bits(tmp_path, kind):
    grouped = kind.startswith("Intx")
    q = (RNG.standard_normal((O, I)) * 30).astype(FLOAT8 if kind == "Float8Tensor" else np.int8)
    scale = RNG.random((O, I // GROUP if grouped else 1)).astype(np.float32)
    arrays = {"qdata": q, "scale": scale} | (
        {"zero_point": RNG.integers(-3, 3, scale.shape).astype(np.int8)} if grouped else {}
    )
    size = I // scale.shape[1]
    wanted = (q.astype(np.float32) - columns(arrays.get("zero_point", np.zeros_like(scale)), size)) * columns(
        scale, size
    )
    check(open_torchao(tmp_path, kind, arrays, block_size=[1, size]), wanted)


def test_torchao_int4(tmp_path):
    """w = q * scale + zero, with scale and zero [groups, outputs]."""
    q, (scale, zero) = RNG.integers(-8, 8, (O, I)), RNG.standard_normal((2, I // GROUP, O)).astype(ml_dtypes.bfloat16)
    wanted = q * columns(scale.T, GROUP) + columns(zero.T, GROUP)
    arrays = {"qdata": nibbles(q).view(np.int8), "scale": scale, "zero_point": zero}
    check(open_torchao(tmp_path, "Int4Tensor", arrays, block_size=[1, GROUP], shape=[O, I]), wanted)


@pytest.mark.parametrize("kind", ["NVFP4Tensor", "MXTensor"])
def test_torchao_four_bit_floats(tmp_path, kind):
    codes, size = RNG.integers(0, 16, (O, I)), 16 if kind == "NVFP4Tensor" else 32
    arrays: dict[str, np.ndarray] = {"qdata": nibbles(codes)}
    if kind == "NVFP4Tensor":
        arrays["scale"] = (RNG.random((O, I // size)) * 4 + 1).astype(FLOAT8)
        arrays["per_tensor_scale"] = np.array(0.3, np.float32)
        factor = arrays["scale"].astype(np.float32) * np.float32(0.3)
    else:
        arrays["scale"] = RNG.integers(120, 134, (O, I // size)).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu)
        factor = arrays["scale"].astype(np.float32)
    check(open_torchao(tmp_path, kind, arrays, block_size=size), of(codes) * columns(factor, size))
    with pytest.raises(ValueError, match=r"'a\._weight_qdata' is not as torchao stores it: its scales are swizzled"):
        open_torchao(tmp_path, kind, arrays, is_swizzled_scales=True)


def test_torchao_layouts_of_one_kernel_are_refused(tmp_path):
    arrays = {"qdata": np.zeros((O, I), np.uint8), "scale": np.ones((O, 2), np.float32)}
    with pytest.raises(
        ValueError, match=r"'a\._weight_qdata'.*its kind is Int4TilePackedTo4dTensor; supported: Float8Tensor"
    ):
        open_torchao(tmp_path, "Int4TilePackedTo4dTensor", arrays)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "aqlm"}, "'aqlm', which is not supported"),
        ({"quant_method": "awq", "version": "gemv"}, "layout 'gemv'"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "layout 'marlin'"),
        (compressed(4) | {"transform_config": {"config_groups": {"R1": {}}}}, "rotated"),
        (compressed(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed(4), r"'a\.weight' \(int32, \[2, 4\]\) is packed in a way that is not known of compressed-tensors"),
    ],
)
def test_what_cannot_be_read_is_named_before_it_is_read(tmp_path, config, said):
    with pytest.raises(ValueError, match=said):
        open_one(tmp_path, {"a.weight": np.zeros((2, 4), np.int32)}, config)


def test_packed_weights_that_nothing_is_said_of(tmp_path):
    save_file({"a.weight": np.zeros((2, 4), np.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"'a\.weight' \(uint8, \[2, 4\]\) is packed, and config\.json has no quantization_config"
    ):
        refuse_packed(SafetensorsCheckpoint(tmp_path))


def test_every_method_is_described():
    assert all(METHODS.values())
