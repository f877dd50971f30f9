"""GGUF files of type adapter, as llama.cpp's `convert_lora_to_gguf.py` writes them.

Tensors are the base's GGUF names with `.lora_a` and `.lora_b`; B's rows have been through the base converter's transforms, which
are undone here as the base's are (`models.loading.gguf_checkpoint`).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from models.adapters.adapter import Adapter, Pair
from models.loading.gguf import GGUFFile
from models.loading.gguf_checkpoint import half_split_rows

_ROTATED = {"llama"}
"""Architectures whose converter interleaves the rows of q and k."""


def read_gguf(path: Path, names: dict[str, str], heads: tuple[int, int]) -> Adapter:
    """Reads an adapter.

    Args:
        names: GGUF's name of a tensor of the base -> Hugging Face's.
        heads: query and key heads of the base.
    Raises:
        ValueError: it is damaged, no adapter, or holds a tensor that changes nothing of the base.
    """
    file = GGUFFile(path)
    if file.metadata.get("general.type") != "adapter" or file.metadata.get("adapter.type") != "lora":
        raise ValueError(f"{path} is not a LoRA adapter: its general.type is {file.metadata.get('general.type')!r}.")
    if file.metadata.get("adapter.alora.invocation_tokens"):
        raise ValueError(f"{path}: activated LoRA is not supported.")
    alpha = float(file.metadata.get("adapter.lora.alpha", 0.0))
    rotated = file.metadata.get("general.architecture") in _ROTATED
    pairs = {}
    for own in file.tensors:
        if own.endswith(".lora_b"):
            if own.removesuffix("b") + "a" not in file.tensors:
                raise ValueError(f"{path}: {own} comes without its lora_a.")
            continue
        base = own.removesuffix(".lora_a")
        if base == own or base not in names:
            raise ValueError(f"{path}: {own} changes no weight of the served model.")
        if f"{base}.lora_b" not in file.tensors:
            raise ValueError(f"{path}: {own} comes without its lora_b.")
        a, b = (np.asarray(file.read(f"{base}.lora_{part}")).astype(np.float32) for part in "ab")
        if base == "token_embd.weight":
            a = a.T
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"{path}: the matrices of {base} have shapes {list(a.shape)} and {list(b.shape)}.")
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"{path}: the matrices of {base} hold values that are not finite.")
        name = names[base]
        if rotated and (".q_proj." in name or ".k_proj." in name):
            b = half_split_rows(b, heads[0] if ".q_proj." in name else heads[1])
        pairs[name] = Pair(a, b * np.float32(alpha / a.shape[0] if alpha else 1.0))
    if not pairs:
        raise ValueError(f"{path} holds no tensors.")
    return Adapter(pairs, str(file.metadata.get("general.base_model.0.name", "")), str(path))


def gguf_names(architecture: str, num_layers: int, names: set[str]) -> dict[str, str]:
    """GGUF's name of each of these tensors (Hugging Face's names), where it has one."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[architecture], num_layers)
    found = {}
    for name in names:
        own = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is not None:
            found[own] = name
    return found
