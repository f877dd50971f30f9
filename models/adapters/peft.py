"""Directories that the package `peft` writes: `adapter_config.json` beside `adapter_model.safetensors`.

The format: huggingface.co/docs/peft, "PEFT checkpoint format". Every tensor of the file is accounted for: one that changes
nothing here is an error that names it, because an adapter that is served in part answers like none that anybody trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.adapters.adapter import Adapter, Pair
from models.loading.files.safetensors import SafetensorsFile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000

_PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false"}
"""Starts of training that leave the base as it is; the others move a part of the base into the adapter."""

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base's own weights; merge it into the base (`python -m serving.convert --adapter`).",
    "lora_bias": "biases of the adapter's own are not supported; train it without lora_bias.",
    "alora_invocation_tokens": "activated LoRA is not supported.",
    "layer_replication": "replicated layers are not supported.",
    "use_bdlora": "block-diagonal LoRA is not supported.",
    "use_qalora": "QALoRA is not supported.",
    "megatron_config": "Megatron's layout is not supported.",
    "trainable_token_indices": "retrained tokens are not supported; train the embedding by LoRA instead.",
}
_TENSOR = re.compile(r"^(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.weight)?$")
_PREFIXES = ("base_model.model.", "base_model.")


def read_peft(directory: Path) -> Adapter:
    """Reads an adapter.

    Args:
        directory: with the two files; or with one folder that has them (an adapter that was saved under a name).
    Raises:
        ValueError: it is not there, damaged, or of a kind that cannot be served beside its base, in a sentence.
    """
    directory = _inside(directory)
    config = _config(directory / CONFIG)
    _check(config, directory)
    if not (directory / WEIGHTS).is_file():
        if (directory / "adapter_model.bin").exists():
            raise ValueError(
                f"{directory} has adapter_model.bin, which may run code when it is read: save it as safetensors."
            )
        raise ValueError(f"{directory} has no {WEIGHTS}.")
    file = SafetensorsFile(directory / WEIGHTS)
    halves: dict[str, dict[str, np.ndarray]] = {}
    left: list[str] = []
    for name in file.tensors:
        match = _TENSOR.match(name)
        if match is None:
            left.append(name)
            continue
        part = match["part"].removeprefix("embedding_")
        halves.setdefault(_module(match["module"]), {})[part] = _values(file, name, directory)
    if left:
        raise ValueError(
            f"{directory}: {len(left)} tensors are no LoRA matrices ({', '.join(sorted(left)[:3])}"
            f"{', ...' if len(left) > 3 else ''}): whole weights, biases and magnitudes cannot be served beside a base. "
            "Merge the adapter into its base (`python -m serving.convert --adapter`)."
        )
    if not halves:
        raise ValueError(f"{directory / WEIGHTS} holds no tensors.")
    pairs = {f"{module}.weight": _pair(module, parts, config, directory) for module, parts in halves.items()}
    return Adapter(pairs, str(config.get("base_model_name_or_path") or ""), str(directory))


def _inside(directory: Path) -> Path:
    if (directory / CONFIG).is_file():
        return directory
    below = sorted(path.parent for path in directory.glob(f"*/{CONFIG}")) if directory.is_dir() else []
    if len(below) == 1:
        return below[0]
    if below:
        raise ValueError(
            f"{directory} holds several adapters: {', '.join(path.name for path in below)}. Name one of them."
        )
    raise ValueError(f"{directory} has no {CONFIG}: it is not a PEFT adapter.")


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; {MAX_CONFIG_BYTES} is the most.")
    try:
        config = json.loads(path.read_bytes().decode())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        raise ValueError(f"{path} is not JSON.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return config


def _check(config: Mapping[str, Any], directory: Path) -> None:
    """Refuses what would be served wrongly."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{directory} is an adapter of type {kind!r}; LORA is what can be served.")
    for field, why in _REFUSED.items():
        if config.get(field) not in (None, False, [], {}, ""):
            raise ValueError(f"{directory}: {field} is set: {why}")
    init = config.get("init_lora_weights", True)
    if (
        not isinstance(init, (bool, str, type(None)))
        or (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS
    ):
        raise ValueError(
            f"{directory}: init_lora_weights is {init!r}, which moves a part of the base's weights into the adapter: beside the "
            "plain base it answers wrongly. Convert it with peft (`path_initial_model_for_weight_conversion`)."
        )
    bias = config.get("bias", "none")
    if bias != "none":
        raise ValueError(f"{directory}: bias is {bias!r}: it carries biases of the base. Merge it into the base.")


def _module(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _values(file: SafetensorsFile, name: str, directory: Path) -> np.ndarray:
    values = np.asarray(file.read(name)).astype(np.float32)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{directory}: {name} has shape {list(values.shape)}; a matrix is needed.")
    if not np.isfinite(values).all():
        raise ValueError(f"{directory}: {name} holds values that are not finite.")
    return values


def _pair(module: str, parts: Mapping[str, np.ndarray], config: Mapping[str, Any], directory: Path) -> Pair:
    if parts.keys() != {"A", "B"}:
        have = "A" if "A" in parts else "B"
        raise ValueError(f"{directory}: {module} has a lora_{have} and no lora_{'B' if have == 'A' else 'A'}.")
    a, b = parts["A"], parts["B"]
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"{directory}: {module} has a lora_A of rank {a.shape[0]} and a lora_B of rank {b.shape[1]}.")
    return Pair(a, b * np.float32(_scale(module, a.shape[0], config, directory)))


def _scale(module: str, rank: int, config: Mapping[str, Any], directory: Path) -> float:
    """alpha / r, or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023, arXiv:2312.03732); alpha from the first pattern that fits."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error:
            found = module == pattern or module.endswith(f".{pattern}")
        if found:
            alpha = value
            break
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not np.isfinite(alpha):
        raise ValueError(f"{directory}: lora_alpha of {module} is {alpha!r}; a number is needed.")
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
