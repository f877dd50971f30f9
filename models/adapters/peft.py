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

from models.adapters.adapter import Adapter, Base, Pair
from models.adapters.whole import TOKENS, with_tokens, without_whole
from models.loading.files.safetensors import SafetensorsFile

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 10_000_000

_PLAIN_INITS = {True, False, None, "gaussian", "eva", "orthogonal", "mica", "true", "false"}
"""Starts of training that leave the base as it is; the others move a part of the base into the adapter."""

_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA rescales the base's own weights; merge it into the base (`python -m serving.convert --adapter`).",
    "lora_bias": "biases of the adapter's own are not supported; train it without lora_bias.",
    "alora_invocation_tokens": "activated LoRA is not supported.",
    "layer_replication": "replicated layers are not supported.",
    "use_bdlora": "block-diagonal LoRA is not supported.",
    "use_qalora": "QALoRA is not supported.",
    "kasa_config": "KaSA truncates the base's own weights.",
    "arrow_config": "Arrow's router over several adapters is not supported.",
    "monteclora_config": "Monte Carlo samples beside the matrices are not supported.",
    "megatron_config": "Megatron's layout is not supported.",
}
_TENSOR = re.compile(r"^(?P<module>.+?)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.weight)?$")
_MAGNITUDE = re.compile(r"^(.+)\.lora_magnitude_vector(?:\.weight)?$")
_WRAPPED = re.compile(r"\.(?:base_layer|modules_to_save)(?=\.)")
_EXPERTS = re.compile(r"^(.+\.layers\.\d+\.(?:(?:mlp|block_sparse_moe|feed_forward)\.)?experts)(?:\.base_layer)*$")
_PREFIXES = ("base_model.model.", "base_model.")


def read_peft(directory: Path, within: Path | None = None, base: Base | None = None, merging: bool = False) -> Adapter:
    """Reads an adapter.

    Args:
        directory: with the two files; or with one folder that has them (an adapter that was saved under a name).
        within: a folder that neither file may lead out of, by links neither.
        base: of the served model; matrices of all experts in one are taken apart by it.
        merging: take what cannot be served beside a base too: DoRA, biases and whole weights.
    Raises:
        ValueError: it is not there, damaged, or of a kind that cannot be served beside its base, in a sentence.
    """
    directory = _inside(directory)
    check_within(directory / CONFIG, within)
    config = _config(directory / CONFIG)
    _check(config, directory, merging)
    if not (directory / WEIGHTS).is_file():
        if (directory / "adapter_model.bin").exists():
            raise ValueError(
                f"{directory} has adapter_model.bin, which may run code when it is read: save it as safetensors."
            )
        raise ValueError(f"{directory} has no {WEIGHTS}.")
    check_within(directory / WEIGHTS, within)
    file = SafetensorsFile(directory / WEIGHTS)
    halves: dict[str, dict[str, np.ndarray]] = {}
    left: list[str] = []
    magnitudes: dict[str, np.ndarray] = {}
    tokens: dict[str, np.ndarray] = {}
    for name in file.tensors:
        match = _TENSOR.match(name)
        if (rows := TOKENS.match(name)) is not None:
            tokens[_module(rows["module"])] = _values(file, name, directory)
            continue
        if merging and (magnitude := _MAGNITUDE.match(name)) is not None:
            magnitudes[f"{_module(magnitude[1])}.weight"] = _finite(file, name, directory)
            continue
        if match is None:
            left.append(name)
            continue
        part = match["part"].removeprefix("embedding_")
        halves.setdefault(_module(match["module"]), {})[part] = _values(file, name, directory)
    if not halves and not left and not tokens:
        raise ValueError(f"{directory / WEIGHTS} holds no tensors.")
    pairs = {}
    for module, parts in halves.items():
        experts = _EXPERTS.match(module)
        if experts is None:
            pairs[f"{module}.weight"] = _pair(module, parts, config, directory)
        else:
            pairs |= _expert_pairs(experts[1], _halves(module, parts, directory), config, directory, base)
    whole = {name: _WRAPPED.sub("", _module(name)) for name in left}
    values = {own: _finite(file, name, directory, kept=not merging) for name, own in whole.items()}
    adapter = Adapter(pairs, str(config.get("base_model_name_or_path") or ""), str(directory), magnitudes, values)
    if tokens:
        adapter = with_tokens(adapter, tokens, config.get("trainable_token_indices"), base)
    copies = frozenset(own for name, own in whole.items() if ".base_layer." in name)
    return adapter if merging or not whole else without_whole(adapter, copies, base)


def check_within(path: Path, within: Path | None) -> None:
    """Refuses a file that lies elsewhere than its name says.

    Raises:
        ValueError: it leads out of the folder.
    """
    if within is not None and not path.resolve().is_relative_to(within.resolve()):
        raise ValueError(f"{path.name} leads out of the folder that adapters are loaded from.")


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


def _check(config: Mapping[str, Any], directory: Path, merging: bool) -> None:
    """Refuses what would be served, or merged, wrongly."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{directory} is an adapter of type {kind!r}; LORA is what can be served.")
    for field, why in _REFUSED.items():
        if merging and field == "use_dora":
            continue
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
    if bias != "none" and not merging:
        raise ValueError(f"{directory}: bias is {bias!r}: it carries biases of the base. Merge it into the base.")


def _module(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _values(file: SafetensorsFile, name: str, directory: Path) -> np.ndarray:
    values = _finite(file, name, directory)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{directory}: {name} has shape {list(values.shape)}; a matrix is needed.")
    return values


def _finite(file: SafetensorsFile, name: str, directory: Path, kept: bool = False) -> np.ndarray:
    """A tensor in float32, or as it is stored."""
    stored = np.asarray(file.read(name))
    values = stored.astype(np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{directory}: {name} holds values that are not finite.")
    return stored if kept else values


def _halves(module: str, parts: Mapping[str, np.ndarray], directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """A and B, of one rank."""
    if parts.keys() != {"A", "B"}:
        have = "A" if "A" in parts else "B"
        raise ValueError(f"{directory}: {module} has a lora_{have} and no lora_{'B' if have == 'A' else 'A'}.")
    a, b = parts["A"], parts["B"]
    if a.shape[0] != b.shape[1]:
        raise ValueError(f"{directory}: {module} has a lora_A of rank {a.shape[0]} and a lora_B of rank {b.shape[1]}.")
    return a, b


def _pair(module: str, parts: Mapping[str, np.ndarray], config: Mapping[str, Any], directory: Path) -> Pair:
    a, b = _halves(module, parts, directory)
    return Pair(a, b * np.float32(_scale(module, a.shape[0], config, directory)))


def _expert_pairs(
    module: str,
    halves: tuple[np.ndarray, np.ndarray],
    config: Mapping[str, Any],
    directory: Path,
    base: Base | None,
) -> dict[str, Pair]:
    """The matrices of all experts in one (`target_parameters`), each expert's by itself: A is [E r, in], B [out, r E], the rank
    outside of the expert. Which parameter they are for is told by the shapes; before peft 0.19 in and out were exchanged."""
    if base is None or base.experts is None:
        raise ValueError(f"{directory}: {module} is adapted, and the served model has no experts.")
    E, D, F = base.experts
    a, b = halves
    kinds = {(D, 2 * F): ("gate_up_proj", False), (F, D): ("down_proj", False)}
    kinds = {(2 * F, D): ("gate_up_proj", True), (D, F): ("down_proj", True)} | kinds
    found = kinds.get((a.shape[1], b.shape[0]))
    if found is None or a.shape[0] % E:
        raise ValueError(
            f"{directory}: the matrices of {module} are [{a.shape[0]}, {a.shape[1]}] and [{b.shape[0]}, {b.shape[1]}]; the served "
            f"model has {E} experts of width {F} between {D} inputs and outputs."
        )
    (name, exchanged), rank = found, a.shape[0] // E
    a_ErI, b_OrE = a.reshape(E, rank, -1), b.reshape(-1, rank, E)
    if exchanged:
        a_ErI, b_OrE = b_OrE.transpose(2, 1, 0), a_ErI.transpose(2, 1, 0)
    scale = np.float32(_scale(f"{module}.{name}", rank, config, directory))
    return {
        f"{module}.{e}.{name}.weight": Pair(np.ascontiguousarray(a_ErI[e]), b_OrE[:, :, e] * scale) for e in range(E)
    }


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
