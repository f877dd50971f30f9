"""Checkpoints whose weights are packed in few bits, seen as if they were dense: weights come out as float32 `[out, in]`.

How each tensor is packed is told by the tensors themselves (models/loading/packed); what the configuration adds is which of two
layouts of the same names it is, and sizes of groups. So layers may differ, and be dense where a tool left them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

import numpy as np

from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.packed.bitsandbytes import FourBits
from models.loading.packed.mlx import Mlx
from models.loading.packed.scaled import ExpertBlocks, FourBitFloats, FourBitRows, Scaled
from models.loading.packed.scheme import Scheme
from models.loading.packed.torchao import TorchAo
from models.loading.packed.words import Awq, CompressedTensors, Gptq, QuarkIntegers
from ops.linear.weights.block_pack import CodedRows

METHODS = {
    "compressed-tensors": "compressed-tensors (llm-compressor): integers of up to eight bits, float8, NVFP4, MXFP4, MXFP6, MXFP8",
    "awq": "AWQ, four bits (AutoAWQ's `gemm` layout)",
    "gptq": "GPTQ of 2, 3, 4 and 8 bits, both formats, sorted inputs too",
    "auto-round": "AutoRound in GPTQ's, AWQ's, its own and llm-compressor's packing",
    "fp8": "float8 with scales by tensor, row or block (DeepSeek-V3)",
    "fbgemm_fp8": "FBGEMM float8, scales by row",
    "w8a8_fp8": "float8, scales by row",
    "w8a8_int8": "int8, scales by row",
    "blockwise_int8": "int8 in blocks",
    "bitsandbytes": "bitsandbytes: NF4, FP4 (in any storage type) and int8",
    "mxfp4": "MXFP4 as in GPT-OSS",
    "modelopt": "NVIDIA modelopt: FP8, NVFP4, MXFP4, W4A16_AWQ, mixed; said in config.json or in hf_quant_config.json",
    "mlx": "MLX: affine of 2 to 8 bits, MXFP4, MXFP8, NVFP4; layers may differ",
    "torchao": "torchao as safetensors: float8, int8, int4, MX, NVFP4",
    "quark": "AMD Quark: float8, MXFP4, int8, four-bit integers",
}
"""What `quantization_config.quant_method` may be, and what is read of it."""
_SYNONYMS = {
    "compressed_tensors": "compressed-tensors",
    "intel/auto-round": "auto-round",
    "auto_round": "auto-round",
    "modelopt_fp4": "modelopt",
    "modelopt_fp8": "modelopt",
    "modelopt_mixed": "modelopt",
    "nvfp4": "modelopt",
}

AUXILIARY = re.compile(
    r"\.(weight_scale|weight_scale_inv|weight_scale_2|weight_zero_point|weight_shape|weight_g_idx|weight_global_scale"
    r"|input_global_scale|input_scale|output_scale|activation_scale|input_zero_point|pre_quant_scale|qzeros|scales?|biases|g_idx"
    r"|[kqv]_scale|prob_scale|qscale_weight|qscale_act|SCB|weight_format)$"
    r"|\.weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__(nf4|fp4))$"
    r"|\._weight_(scale|zero_point|act_pre_scale|per_tensor_scale|act_quant_scale|act_quant_zero_point|act_per_tensor_scale)$"
    r"|\.(weight|input|output)_quantizer\._?\w+$|_scales$|_proj_((weight|input)_)?scale(_inv|_2)?$"
)
"""Tensors that belong to a packed weight, and activation scales, which float32 activations do without."""


def open_quantized(inner: SafetensorsCheckpoint, config: Mapping[str, Any]) -> DequantizingCheckpoint:
    """The dense view of a checkpoint.

    Args:
        config: `quantization_config` of config.json.
    Raises:
        ValueError: a method or layout that is not supported, or a tensor that is not as its method stores it, by name; from headers
            alone.
    """
    method = method_of(config)
    if method not in METHODS:
        raise ValueError(
            f"the checkpoint is quantized by {method!r}, which is not supported; supported: {', '.join(METHODS)}."
        )
    _refuse_layouts(method, config)
    return DequantizingCheckpoint(inner, method, config)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The method that a configuration names, or that its fields are of."""
    named = config.get("quant_method")
    if named is None:
        if "config_groups" in config:
            return "compressed-tensors"
        if "quant_algo" in config:
            return "modelopt"
        return "mlx" if "bits" in config and "group_size" in config else None
    return _SYNONYMS.get(str(named).lower(), str(named).lower())


def _refuse_layouts(method: str, config: Mapping[str, Any]) -> None:
    """Refuses what a method's configuration says and is not read."""
    for name in ("transform_config", "sparsity_config", "config_groups"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise ValueError(f"the checkpoint's quantization has a {name} that is no object.")
    if method in ("awq", "gptq"):
        bits = config.get("bits", config.get("w_bit", 4))
        supported = {"awq": (4,), "gptq": (2, 3, 4, 8)}[method]
        if bits not in supported:
            raise ValueError(f"the checkpoint has {method} weights of {bits!r} bits; supported: {list(supported)}.")
    version = str(config.get("version", "gemm")).lower()
    if method == "awq" and version not in ("gemm", "exllama"):
        raise ValueError(f"the checkpoint has awq weights in the layout {version!r}; supported: 'gemm'.")
    marlin = config.get("is_marlin_format") or config.get("checkpoint_format") == "marlin"
    if method == "gptq" and marlin:
        raise ValueError(
            "the checkpoint has gptq weights in the layout 'marlin', of one kernel; supported: 'gptq', 'gptq_v2'."
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise ValueError("the checkpoint's weights are rotated (transform_config), which is not supported.")
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense":
        raise ValueError(f"the checkpoint's weights are stored sparse ({sparse!r}), which is not supported.")


def _schemes(method: str, config: Mapping[str, Any]) -> tuple[type[Scheme], ...]:
    """Who is asked whose a tensor is, in turn."""
    by_awq = method == "awq" or (method == "auto-round" and "awq" in str(config.get("packing_format", "")))
    return (
        Awq if by_awq else Gptq,
        CompressedTensors,
        ExpertBlocks,
        FourBits,
        TorchAo,
        Mlx,
        FourBitRows,
        FourBitFloats,
        QuarkIntegers,
        Scaled,
    )


def refuse_packed(inner: SafetensorsCheckpoint) -> None:
    """Refuses packed weights in a checkpoint whose configuration says nothing of them.

    Raises:
        ValueError: there are some; the first by name.
    """
    for own in inner.own_names:
        _refuse_integers(inner, own, None)


class DequantizingCheckpoint:
    """A `Checkpoint` that unpacks weights as they are read."""

    def __init__(self, inner: SafetensorsCheckpoint, method: str, config: Mapping[str, Any]):
        self._inner = inner
        schemes = [kind(inner, config, method) for kind in _schemes(method, config)]
        self._packed: dict[str, tuple[Scheme, str]] = {}
        for own in inner.own_names:
            if AUXILIARY.search(own):
                continue
            for scheme in schemes:
                dense = scheme.dense_name(own)
                if dense is not None:
                    scheme.check(own)
                    self._packed[inner.canonical(dense)] = (scheme, own)
                    break
            else:
                _refuse_integers(inner, own, method)

    @property
    def own_names(self) -> Collection[str]:
        return [own for own in self._inner.own_names if not AUXILIARY.search(own)]

    def canonical(self, name: str) -> str:
        """A tensor's name in the plain language model."""
        return self._inner.canonical(name)

    def locate(self, name: str) -> str | None:
        found = self._find(name)
        return found[1] if found else self._inner.locate(name)

    def _find(self, name: str) -> tuple[Scheme, str] | None:
        found = self._packed.get(name) or self._packed.get(name.removeprefix("model."))
        if found is None and name == "model.embed_tokens.weight" and self._inner.locate(name) is None:
            return self._packed.get("lm_head.weight")  # tied, and saved under the other name
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        found = self._find(name)
        return self._inner.shape(name) if found is None else found[0].shape(found[1])

    def read(self, name: str) -> np.ndarray:
        found = self._find(name)
        return self._inner.read(name) if found is None else _taken(found, lambda scheme, own: scheme.read(own))

    def coded(self, name: str, turned: bool = False) -> tuple[CodedRows, np.ndarray | None] | None:
        """As `models.loading.coded.CodedCheckpoint`: values with their scales and zero points, where they have an exact form."""
        found = self._find(name)
        if found is None or not self.is_coded(name, turned):
            return None
        coded = _taken(found, lambda scheme, own: scheme.coded(own))
        return None if coded is None else (coded, None)

    def is_coded(self, name: str, turned: bool = False) -> bool:
        """As `models.loading.coded.CodedCheckpoint`."""
        found = self._find(name)
        return found is not None and found[0].turned == turned and found[0].is_coded(found[1])

    def narrow(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """As `models.loading.coded.NarrowCheckpoint`."""
        found = self._find(name)
        if found is None or not self.is_narrow(name):
            return None
        return _taken(found, lambda scheme, own: scheme.narrow(own))

    def is_narrow(self, name: str, turned: bool = False) -> bool:
        """As `models.loading.coded.NarrowCheckpoint`."""
        found = self._find(name)
        return found is not None and not turned and not found[0].turned and found[0].is_narrow(found[1])

    def release(self, name: str) -> None:
        found = self._find(name)
        self._inner.release(name if found is None else found[1])


T = TypeVar("T")


def _taken(found: tuple[Scheme, str], take: Callable[[Scheme, str], T]) -> T:
    """What a scheme makes of a tensor.

    Raises:
        ValueError: its parts do not fit each other, by name.
    """
    scheme, own = found
    try:
        return take(scheme, own)
    except (ValueError, IndexError, OverflowError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"the tensor {own!r} is not as {scheme.method} stores it: {error}.") from None


def _refuse_integers(inner: SafetensorsCheckpoint, own: str, method: str | None) -> None:
    """No network has integers for weights: it is packed in a way that nobody here knows.

    Args:
        method: what the configuration names; None where it has no `quantization_config`.
    """
    shape, dtype = inner.shape(own), inner.dtype(own)
    if dtype.kind not in "iu" or len(shape) < 2 or not own.endswith((".weight", "_proj", "_packed", ".qweight")):
        return
    if method is None:
        raise ValueError(
            f"the tensor {own!r} ({dtype}, {list(shape)}) is packed, and config.json has no quantization_config that says how."
        )
    raise ValueError(
        f"the tensor {own!r} ({dtype}, {list(shape)}) is packed in a way that is not known of {method}; known: {METHODS[method]}."
    )
