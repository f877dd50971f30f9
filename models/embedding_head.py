"""What a sentence-transformers directory puts behind its network: how hidden states become one vector, and what is done to that.

`modules.json` lists the steps, each with a folder: the transformer, pooling (`1_Pooling/config.json`), dense layers, normalization.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models.pooling import MODES

_MODE_NAMES = {
    "cls": "cls",
    "cls_token": "cls",
    "first": "cls",
    "lasttoken": "last",
    "last": "last",
    "max": "max",
    "max_tokens": "max",
    "mean": "mean",
    "mean_tokens": "mean",
    "mean_sqrt_len": "mean_sqrt_len",
    "mean_sqrt_len_tokens": "mean_sqrt_len",
    "weightedmean": "weightedmean",
    "weightedmean_tokens": "weightedmean",
}
"""Of pooling, in any version's writing -> ours."""
_ERF = np.vectorize(math.erf)
_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0.0),
    "GELU": lambda x: 0.5 * x * (1.0 + _ERF(x / math.sqrt(2.0))),
    "SiLU": lambda x: x / (1.0 + np.exp(-x)),
    "Sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}
_SIMPLE = ("Transformer", "Pooling", "Normalize", "Dense", "Dropout")


@dataclasses.dataclass(frozen=True)
class Dense:
    """activation(W x + b): `weight` [out, in], `bias` [out] or None, float32."""

    weight: np.ndarray
    bias: np.ndarray | None
    activation: str

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weight.T
        return _ACTIVATIONS[self.activation](y if self.bias is None else y + self.bias)


@dataclasses.dataclass(frozen=True)
class EmbeddingHead:
    """From hidden states to a vector.

    Attributes:
        modes: of pooling, by the names of `models.pooling`; the vectors of several stand behind each other.
        steps: what is done to the pooled vector, in order.
        prompts: texts that are put in front of what is embedded, by name.
        default_prompt: the one that is used where none is asked for; "" for none.
    """

    modes: tuple[str, ...] = ("mean",)
    steps: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str = ""

    @property
    def pooling(self) -> str:
        """The modes as one word."""
        return "+".join(self.modes)

    def facts(self) -> dict[str, Any]:
        """What clients are told of it, by the names of `serving.engine.api.types.EngineInfo`."""
        return {"pooling": self.pooling, "prompts": self.prompts, "default_prompt": self.default_prompt}

    def finish(self, pooled: np.ndarray) -> np.ndarray:
        """Vectors of length 1 from pooled ones, float32 [..., width]."""
        for step in self.steps:
            pooled = step(pooled)
        return normalized(pooled).astype(np.float32)


def normalized(x: np.ndarray) -> np.ndarray:
    """Scaled to length 1; zeros stay."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def embedding_head(directory: Path, default: str) -> EmbeddingHead:
    """What a directory asks for.

    Args:
        default: the pooling where it does not say.
    Raises:
        ValueError: a pooling, step or activation that is not supported.
    """
    modules = directory / "modules.json"
    entries = json.loads(modules.read_text(encoding="utf-8")) if modules.exists() else []
    modes: tuple[str, ...] | None = None
    steps: list[Callable[[np.ndarray], np.ndarray]] = []
    for entry in entries:
        kind, folder = str(entry.get("type", "")).rpartition(".")[2], directory / str(entry.get("path", ""))
        if kind not in _SIMPLE:
            raise ValueError(
                f"{modules} has the step {kind!r}, which is not supported; supported: {', '.join(_SIMPLE)}."
            )
        if kind == "Pooling":
            modes = _modes(folder / "config.json")
        elif kind == "Dense":
            steps.append(_dense(folder))
        elif kind == "Normalize":
            steps.append(normalized)
    if modes is None:
        modes = _modes(directory / "1_Pooling" / "config.json")
    return EmbeddingHead(modes or (default,), tuple(steps), *_prompts(directory))


def _modes(path: Path) -> tuple[str, ...] | None:
    """The pooling that a step's configuration asks for; None where there is none."""
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    said = config.get("pooling_mode")  # since version 6; before, a truth value each
    if said is None:
        asked = [name.removeprefix("pooling_mode_") for name, on in config.items() if on is True and "_mode_" in name]
    else:
        asked = said.replace("+", ",").split(",") if isinstance(said, str) else list(said)
    unknown = [name for name in asked if _MODE_NAMES.get(str(name).strip()) not in MODES]
    if unknown:
        raise ValueError(f"{path} asks for the pooling {unknown[0]!r}; supported: {', '.join(MODES)}.")
    return tuple(_MODE_NAMES[str(name).strip()] for name in asked) or None


def _dense(folder: Path) -> Dense:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if kind not in _ACTIVATIONS:
        raise ValueError(
            f"{folder} has the activation {kind!r}, which is not supported; supported: {', '.join(_ACTIVATIONS)}."
        )
    path = folder / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{folder} has no model.safetensors: convert its weights to safetensors.")
    from models.loading.files.safetensors import SafetensorsFile

    file = SafetensorsFile(path)
    found = {name: file.read(name).astype(np.float32) for name in file.tensors}
    weight, bias = found.get("linear.weight"), found.get("linear.bias")
    if weight is None or weight.ndim != 2:
        raise ValueError(f"{path} has no matrix 'linear.weight'.")
    return Dense(weight, bias, kind)


def _prompts(directory: Path) -> tuple[tuple[tuple[str, str], ...], str]:
    path = directory / "config_sentence_transformers.json"
    config: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    prompts = {str(name): str(text) for name, text in (config.get("prompts") or {}).items()}
    return tuple(prompts.items()), prompts.get(str(config.get("default_prompt_name")), "")


def max_sequence(directory: Path) -> int | None:
    """The longest text, in tokens, that a sentence-transformers directory was made for; None where it does not say."""
    path = directory / "sentence_bert_config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("max_seq_length") if path.exists() else None
