"""Packed checkpoints against the values that were packed, with packers written from the formats' descriptions."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.layers import weight
from models.loading.coded import in_groups
from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.load import load_model, resolve
from models.loading.packed.arrays import unpack
from models.loading.quantized import open_quantized
from models.recipes import one
from ops import native
from ops.linear.weights.block_pack import pack as pack_blocks
from tests.models.loading.test_load import HF, tensors

O, I, GROUP = 32, 64, 32
RNG = np.random.default_rng(0)


def pack(values: np.ndarray, bits: int = 4) -> np.ndarray:
    """Columns into int32 words, lowest bits first, one word at a time; GPTQ's three bits as a stream of them."""
    if bits == 3:
        return pack_3_bits(values)
    per_word = 32 // bits
    words = np.zeros((values.shape[0], values.shape[1] // per_word), np.uint32)
    for column in range(values.shape[1]):
        words[:, column // per_word] |= values[:, column].astype(np.uint32) << np.uint32(bits * (column % per_word))
    return words.view(np.int32)


def pack_3_bits(values: np.ndarray) -> np.ndarray:
    """32 values in three words, as AutoGPTQ's packing loop writes them: values 10 and 21 lie across two words."""
    out = []
    for at in range(0, values.shape[1], 32):
        v = values[:, at : at + 32].astype(np.uint64)
        words = np.zeros((values.shape[0], 3), np.uint64)
        for i in range(10):
            words[:, 0] |= v[:, i] << np.uint64(3 * i)
            words[:, 1] |= v[:, 11 + i] << np.uint64(3 * i + 1)
            words[:, 2] |= v[:, 22 + i] << np.uint64(3 * i + 2)
        words[:, 0] |= (v[:, 10] & np.uint64(3)) << np.uint64(30)
        words[:, 1] |= (v[:, 10] >> np.uint64(2)) | (v[:, 21] & np.uint64(1)) << np.uint64(31)
        words[:, 2] |= v[:, 21] >> np.uint64(1)
        out.append(words.astype(np.uint32).view(np.int32))
    return np.concatenate(out, axis=1)


def open_one(tmp_path, arrays, config):
    save_file(arrays, tmp_path / "model.safetensors")
    return open_quantized(SafetensorsCheckpoint(tmp_path), config)


def compressed(bits, **weights):
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": bits, **weights}}},
    }


def check(checkpoint, wanted, name="a.weight", turned=False):
    assert checkpoint.locate(name) in checkpoint.own_names
    assert len(list(checkpoint.own_names)) == 1  # scales and the like are not left over
    assert checkpoint.shape(name) == wanted.shape
    np.testing.assert_allclose(checkpoint.read(name), wanted, rtol=1e-6)
    found = checkpoint.coded(name, turned)
    assert (found is None) <= (not checkpoint.is_coded(name, turned))
    assert not checkpoint.is_coded(name, not turned) and checkpoint.coded(name, not turned) is None
    if found is not None and native.available():
        coded, order = found
        assert order is None
        rows = wanted.swapaxes(-1, -2) if turned else wanted
        rows = rows.reshape(-1, rows.shape[-1])
        kept = pack_blocks([coded], np.zeros(len(rows), int), np.arange(len(rows)))
        np.testing.assert_allclose(kept.dequantize(), rows, rtol=1e-6, atol=2e-6 * np.abs(wanted).max())
    check_groups(checkpoint, wanted, name)
    return found


def check_groups(checkpoint, wanted, name):
    """What accelerators compute with stands for the same numbers."""
    if wanted.ndim != 2:
        return
    rows = in_groups(one(name, *wanted.shape), weight(wanted.shape, np.float32, (None, None)), checkpoint)
    made = None if rows is None else rows.weight(wanted.shape, "cpu")
    if made is not None:
        np.testing.assert_allclose(made.dequantize(), wanted, rtol=1e-6, atol=2e-6 * np.abs(wanted).max())
    elif native.available() and wanted.shape == (O, I):
        assert not checkpoint.is_coded(name) and not checkpoint.is_narrow(name)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
def test_compressed_tensors_packed(tmp_path, bits, zeros):
    offset = 1 << (bits - 1)
    q = RNG.integers(-offset, offset, (O, I))
    scale = RNG.random((O, I // GROUP)).astype(np.float32)
    zero = RNG.integers(-offset, offset, scale.shape) if zeros else np.zeros(scale.shape, int)
    arrays = {"a.weight_packed": pack(q + offset, bits), "a.weight_scale": scale}
    arrays["a.weight_shape"] = np.array([O, I], np.int64)
    if zeros:
        arrays["a.weight_zero_point"] = np.ascontiguousarray(pack((zero + offset).T, bits).T)
    wanted = (q - np.repeat(zero, GROUP, 1)) * np.repeat(scale, GROUP, 1)
    assert check(open_one(tmp_path, arrays, compressed(bits)), wanted)


def bitstream(values: np.ndarray, bits: int) -> np.ndarray:
    """Columns into int32 words as one long number a row, lowest bits first: how compressed-tensors packs any width."""
    words = -(-values.shape[1] * bits // 32)
    rows = [sum(int(v) << (bits * i) for i, v in enumerate(row)).to_bytes(4 * words, "little") for row in values]
    return np.frombuffer(b"".join(rows), np.int32).reshape(len(values), words).copy()


@pytest.mark.parametrize("columns", [64, 100])
@pytest.mark.parametrize("bits", range(2, 9))
def test_compressed_tensors_of_any_width(tmp_path, bits, columns):
    """Two tensors of different widths, groups that do not fill their last one, inputs in another order."""
    groups = -(-columns // GROUP)
    arrays, wanted = {}, {}
    for name, width in (("a", bits), ("b", 4)):
        half = 1 << (width - 1)
        q, scale = RNG.integers(-half, half, (O, columns)), RNG.random((O, groups)).astype(np.float32)
        group = np.arange(columns) // GROUP if name == "a" else RNG.permutation(np.arange(columns) // GROUP)
        arrays |= {f"{name}.weight_packed": bitstream(q + half, width), f"{name}.weight_scale": scale}
        arrays[f"{name}.weight_shape"] = np.array([O, columns], np.int64)
        if name == "b":
            arrays["b.weight_g_idx"] = group.astype(np.int32)
        wanted[name] = q * scale[:, group]
    checkpoint = open_one(tmp_path, arrays, compressed(bits, group_size=GROUP))
    for name, values in wanted.items():
        assert checkpoint.shape(f"{name}.weight") == values.shape
        np.testing.assert_allclose(checkpoint.read(f"{name}.weight"), values, rtol=1e-6)


def float4(code: int) -> float:
    """E2M1: a sign, two bits of exponent with an offset of 1, one of mantissa."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (0.5 * mantissa if exponent == 0 else 2.0 ** (exponent - 1) * (1 + 0.5 * mantissa))


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4"])
def test_compressed_tensors_four_bit_floats(tmp_path, kind):
    codes = RNG.integers(0, 16, (O, I))
    dense = np.vectorize(float4)(codes)
    arrays = {"a.weight_packed": (codes[:, ::2] | codes[:, 1::2] << 4).astype(np.uint8)}
    if kind == "nvfp4":
        scale = (RNG.random((O, I // 16)) * 200 + 1).astype(ml_dtypes.float8_e4m3fn)
        arrays |= {"a.weight_scale": scale, "a.weight_global_scale": np.array([37.5], np.float32)}
        arrays["a.input_global_scale"] = np.array([2.0], np.float32)
        wanted = dense * np.repeat(scale.astype(np.float32), 16, 1) / 37.5
    else:
        exponent = RNG.integers(120, 134, (O, I // 32))
        arrays["a.weight_scale"] = exponent.astype(np.uint8)
        wanted = dense * np.repeat(2.0 ** (exponent - 127), 32, 1)
    assert check(
        open_one(tmp_path, arrays, compressed(4, type="float", group_size=16 if kind == "nvfp4" else 32)), wanted
    )


def test_compressed_tensors_float8_of_32_inputs(tmp_path):
    q, exponent = RNG.standard_normal((O, I)).astype(ml_dtypes.float8_e4m3fn), RNG.integers(120, 134, (O, I // 32))
    arrays = {"a.weight": q, "a.weight_scale": exponent.astype(np.uint8)}
    wanted = q.astype(np.float32) * np.repeat(2.0 ** (exponent - 127), 32, 1)
    check(open_one(tmp_path, arrays, compressed(8, type="float", group_size=32)), wanted)


def test_compressed_tensors_int8_with_zeros(tmp_path):
    q, scale = RNG.integers(-127, 128, (O, I)).astype(np.int8), RNG.random((O, 1)).astype(np.float32)
    zero = RNG.integers(-20, 20, (O, 1)).astype(np.int8)
    arrays = {"a.weight": q, "a.weight_scale": scale, "a.weight_zero_point": zero}
    check(open_one(tmp_path, arrays, compressed(8)), (q.astype(np.float32) - zero) * scale)


def test_compressed_tensors_int8_by_row(tmp_path):
    q, scale = RNG.integers(-127, 128, (O, I)).astype(np.int8), RNG.random((O, 1)).astype(np.float32)
    check(open_one(tmp_path, {"a.weight": q, "a.weight_scale": scale}, compressed(8)), q * scale)


@pytest.mark.parametrize("shape", [(), (1,), (O,), (O, 1)])
def test_float8_by_tensor_and_row(tmp_path, shape):
    q = RNG.standard_normal((O, I)).astype(ml_dtypes.float8_e4m3fn)
    scale = np.asarray(RNG.random(shape), np.float32)
    arrays = {"a.weight": q, "a.weight_scale": scale, "a.input_scale": np.ones(1, np.float32)}
    arrays["a.activation_scale"] = np.ones(1, np.float32)
    wanted = q.astype(np.float32) * (scale.reshape(-1, 1) if scale.ndim else scale)
    check(open_one(tmp_path, arrays, {"quant_method": "fp8"}), wanted)


@pytest.mark.parametrize("kernels", [True, False])
def test_float8_by_block(tmp_path, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "available", lambda: False)
    q = RNG.standard_normal((20, 40)).astype(ml_dtypes.float8_e4m3fn)
    scale = RNG.random((3, 3)).astype(np.float32)
    wanted = q.astype(np.float32) * np.repeat(np.repeat(scale, 8, 0)[:20], 16, 1)[:, :40]
    config = {"quant_method": "fp8", "weight_block_size": [8, 16]}
    check(open_one(tmp_path, {"a.weight": q, "a.weight_scale_inv": scale}, config), wanted)


@pytest.mark.parametrize("size", [GROUP, -1])
def test_awq(tmp_path, size):
    groups = I // (I if size == -1 else size)
    q, zero = RNG.integers(0, 16, (I, O)), RNG.integers(0, 16, (groups, O))
    scale = RNG.random((groups, O)).astype(np.float16)

    def shuffled(values):
        order = [0, 2, 4, 6, 1, 3, 5, 7]  # AutoAWQ's order_map: nibble i of a word holds column order[i]
        return pack(values.reshape(len(values), -1, 8)[:, :, order].reshape(values.shape))

    arrays = {"a.qweight": shuffled(q), "a.qzeros": shuffled(zero), "a.scales": scale}
    wanted = (q - np.repeat(zero, I // groups, 0)) * np.repeat(scale.astype(np.float32), I // groups, 0)
    assert check(open_one(tmp_path, arrays, {"quant_method": "awq", "bits": 4, "group_size": size}), wanted.T)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq(tmp_path, bits, order, version):
    top = 1 << bits
    q, zero = RNG.integers(0, top, (I, O)), RNG.integers(0, top, (I // GROUP, O))
    scale = RNG.random((I // GROUP, O)).astype(np.float16)
    group = RNG.permutation(np.arange(I) // GROUP) if order else np.arange(I) // GROUP
    stored = (zero - (version == "gptq")) % top
    arrays = {"a.qweight": np.ascontiguousarray(pack(q.T, bits).T), "a.qzeros": pack(stored, bits), "a.scales": scale}
    arrays["a.g_idx"] = group.astype(np.int32)
    config = {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}
    wanted = (q - zero[group]) * scale.astype(np.float32)[group]
    assert check(open_one(tmp_path, arrays, config), wanted.T)


def damaged(arrays: dict[str, np.ndarray], name: str, change) -> dict[str, np.ndarray]:
    return {**arrays, name: np.ascontiguousarray(change(arrays[name].copy()))}


def with_nan(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.nan
    return array


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.scales", with_nan),
        ("a.scales", lambda a: a[:1]),
        ("a.scales", lambda a: a[:, :5]),
        ("a.scales", lambda a: a[:0]),
        ("a.qzeros", lambda a: a[:1]),
        ("a.qzeros", lambda a: a[:, :1]),
        ("a.g_idx", lambda a: a + 1),
        ("a.g_idx", lambda a: a[:-1]),
        ("a.g_idx", lambda a: a * 1000),
    ],
)
def test_integers_that_do_not_fit_their_scales_are_refused(tmp_path, name, change):
    """By name, in a sentence, whether they are read as floats or kept as they are stored."""
    q, group = RNG.integers(0, 16, (I, O)), RNG.permutation(np.arange(I) // GROUP).astype(np.int32)
    arrays = {"a.qweight": np.ascontiguousarray(pack(q.T).T), "a.qzeros": pack(RNG.integers(0, 16, (I // GROUP, O)))}
    arrays |= {"a.scales": RNG.random((I // GROUP, O)).astype(np.float16), "a.g_idx": group}
    config = {"quant_method": "gptq", "bits": 4, "group_size": GROUP}
    for take in ("read", "coded"):
        with pytest.raises(ValueError, match=r"'a\.qweight'"):
            getattr(open_one(tmp_path, damaged(arrays, name, change), config), take)("a.weight")


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.int64])
def test_integers_come_in_words(tmp_path, dtype):
    arrays = {"a.weight_packed": np.zeros((O, I // 8), dtype), "a.weight_scale": np.ones((O, I // GROUP), np.float32)}
    with pytest.raises(ValueError, match=r"'a\.weight_packed'.* int32"):
        open_one(tmp_path, arrays | {"a.weight_shape": np.array([O, I])}, compressed(4))


def test_zero_points_are_bytes(tmp_path):
    arrays = {
        "a.weight_packed": pack(RNG.integers(0, 16, (O, I))),
        "a.weight_scale": np.ones((O, I // GROUP), np.float32),
    }
    arrays |= {"a.weight_shape": np.array([O, I]), "a.weight_zero_point": np.full((O, I // GROUP), -100, np.int8)}
    for take in ("read", "coded"):
        with pytest.raises(ValueError, match=r"'a\.weight_packed'.*from -92 to -92"):
            getattr(open_one(tmp_path, arrays, compressed(4)), take)("a.weight")


NF4 = np.array([-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
                0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1], np.float32)  # fmt: skip


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(O, I), (5, 50)])
def test_bitsandbytes_four_bits(tmp_path, shape, nested):
    """Blocks of 64 run on over the ends of rows; the last one may not be full."""
    count = shape[0] * shape[1]
    codes, blocks = RNG.integers(0, 16, count), -(-count // 64)
    absmax = RNG.random(blocks).astype(np.float32) + 0.5
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(shape)}
    arrays = {"a.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], "a.weight.quant_map": NF4}
    if nested:
        rounded, levels = RNG.integers(0, 256, blocks).astype(np.uint8), np.linspace(-1, 1, 256, dtype=np.float32)
        outer = RNG.random(-(-blocks // 16)).astype(np.float32)
        state |= {"nested_blocksize": 16, "nested_dtype": "float32", "nested_offset": 0.6}
        arrays |= {"a.weight.absmax": rounded, "a.weight.nested_absmax": outer, "a.weight.nested_quant_map": levels}
        absmax = np.array([levels[rounded[b]] * outer[b // 16] + 0.6 for b in range(blocks)], np.float32)
    else:
        arrays["a.weight.absmax"] = absmax
    arrays["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    wanted = np.array([NF4[code] * absmax[i // 64] for i, code in enumerate(codes)], np.float32).reshape(shape)
    check(open_one(tmp_path, arrays, {"quant_method": "bitsandbytes", "load_in_4bit": True}), wanted)
    arrays["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(b"{}", np.uint8)
    with pytest.raises(ValueError, match=r"a\.weight.* damaged"):
        open_one(tmp_path, arrays, {"quant_method": "bitsandbytes"}).read("a.weight")


FP4 = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 0.5, 1 / 6, 0.25], np.float32)
NF4_EXACT = np.array([-1, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0,
                      0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1], np.float32)  # fmt: skip


def in_four_bits(kind: str, table: np.ndarray, shape: tuple[int, int], size: int = 64):
    """(tensors of a weight, the values that they stand for)."""
    codes, blocks = RNG.integers(0, 16, shape[0] * shape[1]), -(-shape[0] * shape[1] // size)
    absmax = RNG.random(blocks).astype(np.float32) + 0.5
    state = {"quant_type": kind, "blocksize": size, "dtype": "bfloat16", "shape": list(shape)}
    arrays = {"a.weight": (codes[::2] << 4 | codes[1::2]).astype(np.uint8)[:, None], "a.weight.quant_map": table}
    arrays |= {"a.weight.absmax": absmax}
    arrays[f"a.weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return arrays, (table[codes] * np.repeat(absmax, size)[: len(codes)]).reshape(shape)


@pytest.mark.skipif(not native.available(), reason=native.status())
@pytest.mark.parametrize(("kind", "table", "atol"), [("nf4", NF4_EXACT, 1.6e-5), ("fp4", np.append(FP4, -FP4), 1e-6)])
@pytest.mark.parametrize("size", [32, 64])
def test_bitsandbytes_stays_as_it_is_stored(tmp_path, kind, table, atol, size):
    """Codes, and the table's entries in 16 bits; blocks that end within a row, and other tables, go by way of floats."""
    arrays, wanted = in_four_bits(kind, table, (O, I), size)
    checkpoint = open_one(tmp_path, arrays, {"quant_method": "bitsandbytes"})
    found = checkpoint.coded("a.weight")
    assert checkpoint.is_coded("a.weight") and found is not None and found[0].form.table == kind
    kept = pack_blocks([found[0]], np.zeros(O, int), np.arange(O))
    np.testing.assert_allclose(kept.dequantize(), wanted, atol=atol * np.abs(wanted).max(), rtol=0)
    for other in (in_four_bits(kind, table, (O, 96), 64)[0], in_four_bits(kind, table + np.float32(0.01), (O, I))[0]):
        checkpoint = open_one(tmp_path, other, {"quant_method": "bitsandbytes"})
        assert not checkpoint.is_coded("a.weight") and checkpoint.coded("a.weight") is None


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [O, I + 64]}, {"shape": [-O, -I]}, {"shape": [0, I]}, {"shape": [1 << 62, 4]}, {"blocksize": 0},
        {"blocksize": -64}, {"blocksize": 16}, {"nested_blocksize": None}, {"nested_blocksize": 1}, {"nested_offset": "x"},
        {"shape": 7}, {"shape": [float("inf"), 1]},
    ],
)  # fmt: skip
def test_what_bitsandbytes_says_wrongly_is_refused(tmp_path, lie):
    arrays, _ = in_four_bits("nf4", NF4_EXACT, (O, I))
    state = {"blocksize": 64, "shape": [O, I], "nested_blocksize": 16, "nested_offset": 0.5} | lie
    arrays["a.weight.absmax"] = RNG.integers(0, 256, O * I // 64).astype(np.uint8)
    arrays |= {"a.weight.nested_absmax": np.ones(2, np.float32), "a.weight.nested_quant_map": np.ones(256, np.float32)}
    arrays["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    for take in ("read", "coded"):
        with pytest.raises(ValueError, match=r"a\.weight"):
            checkpoint = open_one(tmp_path, arrays, {"quant_method": "bitsandbytes"})
            if take == "coded" and not checkpoint.is_coded("a.weight"):
                checkpoint.read("a.weight")
            getattr(checkpoint, take)("a.weight")


def test_bitsandbytes_int8(tmp_path):
    q, largest = RNG.integers(-127, 128, (O, I)).astype(np.int8), RNG.random(O).astype(np.float32)
    arrays = {"a.weight": q, "a.SCB": largest, "a.weight_format": np.array(0, np.uint8)}
    check(
        open_one(tmp_path, arrays, {"quant_method": "bitsandbytes", "load_in_8bit": True}), q * largest[:, None] / 127
    )


def test_mxfp4(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    torch = pytest.importorskip("torch")
    blocks = RNG.integers(0, 256, (3, 8, 2, 16)).astype(np.uint8)
    scales = RNG.integers(120, 134, (3, 8, 2)).astype(np.uint8)
    name = "model.layers.0.mlp.experts.down_proj"
    checkpoint = open_one(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    wanted = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=torch.float32)
    assert check(checkpoint, wanted.numpy(), name, turned=True)


def test_unpack_is_the_inverse_of_packing():
    values = RNG.integers(0, 16, (3, 16))
    np.testing.assert_array_equal(unpack(pack(values), 4), values)


def test_a_whole_checkpoint(tmp_path):
    arrays = tensors(RNG)
    dense = {}
    for name in [name for name in arrays if "_proj" in name]:
        weight = arrays.pop(name)
        scale = np.abs(weight).max(1, keepdims=True) / 7
        q = np.clip(np.round(weight / scale), -8, 7).astype(int)
        base = name.removesuffix(".weight")
        arrays |= {f"{base}.weight_packed": pack(q + 8), f"{base}.weight_scale": scale}
        arrays[f"{base}.weight_shape"] = np.array(weight.shape, np.int64)
        dense[name] = (q * scale).astype(np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF | {"quantization_config": compressed(4)}))
    model = load_model(resolve(str(tmp_path)), progress=False).model
    got = np.asarray(model.layers[0].mlp.down.weight[...])
    np.testing.assert_allclose(got, dense["model.layers.0.mlp.down_proj.weight"], rtol=1e-6)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "quip"}, "'quip'.*compressed-tensors"),
        ({"quant_method": "gptq", "bits": 5}, "5 bits"),
        ({"quant_method": "awq", "bits": 8}, "8 bits"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, config, said):
    with pytest.raises(ValueError, match=said):
        open_one(tmp_path, {"a.weight": np.zeros((2, 2), np.float32)}, config)


def test_missing_scale_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tensor 'a\.weight_scale': without it 'a\.weight' \(fp8\) cannot be read"):
        open_one(tmp_path, {"a.weight": np.zeros((2, 2), np.int8)}, {"quant_method": "fp8"})
