"""Tensors that GGUF's converter splits, joins or turns, put back into the shape that Hugging Face's names promise."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from models.loading.gguf import GGUFFile


@dataclasses.dataclass(frozen=True)
class Layout:
    """One tensor made from others of the file.

    Attributes:
        sources: the file's names, the first standing for all.
        shape: of the result.
        make: (the sources' values) -> the result.
    """

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]


SECONDARY = {
    "gpt-oss": re.compile(r"\.ffn_up_exps\."),
    "llama4": re.compile(r"\.ffn_up_exps\."),
    "granitemoe": re.compile(r"\.ffn_up_exps\."),
    "deepseek2": re.compile(r"\.attn_v_b\."),
}
"""Tensors that only come in as a second source; they stand for no tensor of their own."""

_LAYER = re.compile(r"^(?:model\.layers|transformer\.h)\.(\d+)\.(.+)$")


def layout(file: GGUFFile, architecture: str, name: str) -> Layout | None:
    """How `name` is made where the file does not have it as it is; None where it does (or does not have it at all)."""
    match = _LAYER.match(name)
    maker = _MAKERS.get(architecture)
    if match is None or maker is None:
        return None
    return maker(file, f"blk.{match.group(1)}", match.group(2))


def _gpt2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Conv1D matrices are stored [out, in]; Hugging Face has them [in, out]."""
    own = {
        "attn.c_attn.weight": "attn_qkv",
        "attn.c_proj.weight": "attn_output",
        "mlp.c_fc.weight": "ffn_up",
        "mlp.c_proj.weight": "ffn_down",
    }.get(part)
    source = f"{block}.{own}.weight"
    if own is None or source not in file.tensors:
        return None
    return Layout((source,), file.tensors[source].shape[::-1], lambda array: array.T)


def _gpt_oss(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart and [out, in]; Hugging Face has them alternating and [in, out]."""
    kind = "bias" if part.endswith("_bias") else "weight"
    gate, up, down = (f"{block}.ffn_{name}_exps.{kind}" for name in ("gate", "up", "down"))
    if part == "self_attn.sinks" and f"{block}.attn_sinks.weight" in file.tensors:
        source = f"{block}.attn_sinks.weight"
        return Layout((source,), file.tensors[source].shape, lambda array: array)
    if part.startswith("mlp.experts.gate_up_proj") and gate in file.tensors and up in file.tensors:
        E, F, *rest = file.tensors[gate].shape

        def alternate(gate_EF: np.ndarray, up_EF: np.ndarray) -> np.ndarray:
            both = np.stack([gate_EF, up_EF], axis=2).reshape(E, 2 * F, *rest)
            return both.swapaxes(1, 2) if rest else both

        return Layout((gate, up), (E, *rest, 2 * F), alternate)
    if part.startswith("mlp.experts.down_proj") and down in file.tensors:
        shape = file.tensors[down].shape
        if kind == "bias":
            return Layout((down,), shape, lambda array: array)
        return Layout((down,), (shape[0], shape[2], shape[1]), lambda array: array.swapaxes(1, 2))
    return None


def _llama4(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart and [out, in]; Hugging Face has the gate first, then up, and [in, out]."""
    gate, up, down = (f"{block}.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
    if part == "feed_forward.experts.gate_up_proj" and gate in file.tensors and up in file.tensors:
        E, F, D = file.tensors[gate].shape

        def join(gate_EFD: np.ndarray, up_EFD: np.ndarray) -> np.ndarray:
            return np.concatenate([gate_EFD, up_EFD], axis=1).swapaxes(1, 2)

        return Layout((gate, up), (E, D, 2 * F), join)
    if part == "feed_forward.experts.down_proj" and down in file.tensors:
        E, D, F = file.tensors[down].shape
        return Layout((down,), (E, F, D), lambda array: array.swapaxes(1, 2))
    return None


def _granitemoe(file: GGUFFile, block: str, part: str) -> Layout | None:
    """Experts: gate and up apart; Hugging Face has the gate's rows first, then up's."""
    gate, up = (f"{block}.ffn_{name}_exps.weight" for name in ("gate", "up"))
    if part != "block_sparse_moe.input_linear.weight" or gate not in file.tensors or up not in file.tensors:
        return None
    E, F, D = file.tensors[gate].shape
    return Layout((gate, up), (E, 2 * F, D), lambda *halves: np.concatenate(halves, axis=1))


def _deepseek2(file: GGUFFile, block: str, part: str) -> Layout | None:
    """The latent's expansion is stored as one matrix a head for keys (turned) and one for values."""
    if part == "mlp.gate.e_score_correction_bias" and f"{block}.exp_probs_b.bias" in file.tensors:
        source = f"{block}.exp_probs_b.bias"
        return Layout((source,), file.tensors[source].shape, lambda array: array)
    keys, values = f"{block}.attn_k_b.weight", f"{block}.attn_v_b.weight"
    if part == "self_attn.kv_b_proj.weight" and keys in file.tensors and values in file.tensors:
        (H, rank, nope), (_, v_dim, _) = file.tensors[keys].shape, file.tensors[values].shape

        def join(keys_Hrn: np.ndarray, values_Hvr: np.ndarray) -> np.ndarray:
            return np.concatenate([keys_Hrn.swapaxes(1, 2), values_Hvr], axis=1).reshape(-1, rank)

        return Layout((keys, values), (H * (nope + v_dim), rank), join)
    return None


_MAKERS: dict[str, Callable[[GGUFFile, str, str], Layout | None]] = {
    "gpt2": _gpt2,
    "gpt-oss": _gpt_oss,
    "llama4": _llama4,
    "granitemoe": _granitemoe,
    "deepseek2": _deepseek2,
}
