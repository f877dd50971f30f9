"""GGUF files of type adapter, as llama.cpp's `convert_lora_to_gguf.py` writes them.

Tensors are the base's GGUF names with `.lora_a` and `.lora_b`; B's rows have been through the base converter's transforms, which
are undone here as the base's are (`models.loading.gguf.checkpoint`).
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from models.adapters.adapter import Adapter, Base, Pair
from models.loading.gguf.checkpoint import EXPERT, half_split_rows, table_names
from models.loading.gguf.config import INTERLEAVED
from models.loading.gguf.file import GGUFFile


def read_gguf(path: Path, base: Base) -> Adapter:
    """Reads an adapter.

    Args:
        base: of the served model: the file's tensors have names and rows of a converted one.
    Raises:
        ValueError: it is damaged, no adapter, or holds a tensor that changes nothing of the base.
    """
    file = GGUFFile(path)
    facts = file.metadata
    if facts.get("general.type") != "adapter" or facts.get("adapter.type") != "lora":
        raise ValueError(f"{path} is not a LoRA adapter: its general.type is {facts.get('general.type')!r}.")
    if "adapter.alora.invocation_tokens" in facts:
        raise ValueError(f"{path}: activated LoRA is not supported.")
    alpha = facts.get("adapter.lora.alpha", 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not np.isfinite(alpha):
        raise ValueError(f"{path}: adapter.lora.alpha is {alpha!r}; a number is needed.")
    architecture = facts.get("general.architecture")
    names = _names(path, architecture, base)
    pairs = {}
    for own in file.tensors:
        tensor = own.removesuffix(".lora_a").removesuffix(".lora_b")
        if tensor == own:
            raise ValueError(
                f"{path}: {own} is a whole tensor, which cannot be served beside a base. Merge the adapter into its base."
            )
        if tensor not in names:
            raise ValueError(f"{path}: {own} changes no weight of the served model.")
        if own.endswith(".lora_a"):
            for name, pair in zip(names[tensor], _pairs(file, tensor, float(alpha), len(names[tensor])), strict=True):
                if architecture in INTERLEAVED and (".q_proj." in name or ".k_proj." in name):
                    heads = base.heads[".k_proj." in name]
                    if pair.b_Or.shape[0] % (2 * heads):
                        raise ValueError(
                            f"{path}: {own} has {pair.b_Or.shape[0]} rows, which {heads} heads do not divide."
                        )
                    pair = Pair(pair.a_rI, half_split_rows(pair.b_Or, heads))
                pairs[name] = pair
        elif f"{tensor}.lora_a" not in file.tensors:
            raise ValueError(f"{path}: {own} comes without its lora_a.")
    if not pairs:
        raise ValueError(f"{path} holds no tensors.")
    return Adapter(pairs, str(facts.get("general.base_model.0.name", "")), str(path))


def _names(path: Path, architecture: object, base: Base) -> dict[str, list[str]]:
    """GGUF's name of each tensor of the served model -> Hugging Face's; of a stack of experts one each, in their order."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if not isinstance(architecture, str) or architecture not in kinds:
        raise ValueError(f"{path}: its general.architecture is {architecture!r}, which is not known.")
    table = gguf.get_tensor_name_map(kinds[architecture], base.num_layers)
    found: dict[str, list[str]] = {}
    for name in base.tensors:
        for own in dict.fromkeys(table_names(table, name)):
            found.setdefault(own, []).append(name)
    for names in found.values():
        names.sort(key=lambda name: int(number[1]) if (number := EXPERT.search(name)) else 0)
    return found


def _pairs(file: GGUFFile, tensor: str, alpha: float, count: int) -> list[Pair]:
    """The matrices of a tensor: one pair, or one an expert of a stack."""
    path = file.path
    if f"{tensor}.lora_b" not in file.tensors:
        raise ValueError(f"{path}: {tensor}.lora_a comes without its lora_b.")
    a, b = (np.asarray(file.read(f"{tensor}.lora_{part}")).astype(np.float32) for part in "ab")
    if tensor == "token_embd.weight" and a.ndim == 2:  # stored turned
        a = a.T
    stacked = a.ndim == b.ndim == 3 and a.shape[0] == b.shape[0] == count
    if (not stacked and (a.ndim != 2 or b.ndim != 2 or count > 1)) or a.shape[-2] != b.shape[-1] or 0 in a.shape:
        raise ValueError(f"{path}: the matrices of {tensor} have shapes {list(a.shape)} and {list(b.shape)}.")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{path}: the matrices of {tensor} hold values that are not finite.")
    b = b * np.float32(alpha / a.shape[-2] if alpha else 1.0)
    return [Pair(*matrices) for matrices in (zip(a, b, strict=True) if stacked else [(a, b)])]
