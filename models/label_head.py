"""What a sequence classifier's numbers mean: the names of its labels, and what makes probabilities of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig

_BY_PROBLEM = {
    "regression": "identity",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
"""transformers' `problem_type` -> what its loss of that type was computed over."""
_NAMED = {"Identity": "identity", "Sigmoid": "sigmoid", "Softmax": "softmax"}
"""torch's names, as sentence-transformers writes them -> ours."""


@dataclasses.dataclass(frozen=True)
class LabelHead:
    """A classifier's labels.

    Attributes:
        labels: their names, in the order of the logits.
        activation: what is done to the logits: "softmax" (one label of all is true), "sigmoid" (each by itself), "identity".
    """

    labels: tuple[str, ...] = ("LABEL_0",)
    activation: str = "sigmoid"

    @property
    def scores(self) -> bool:
        """Whether its one number says how well two texts fit: a reranker."""
        return len(self.labels) == 1

    def finish(self, logit_BL: np.ndarray) -> np.ndarray:
        """float32 [..., labels] from logits."""
        if self.activation == "identity":
            return logit_BL
        if self.activation == "sigmoid":
            return 1.0 / (1.0 + np.exp(-np.clip(logit_BL, -88.0, None)))
        weights = np.exp(logit_BL - logit_BL.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    @classmethod
    def of(cls, config: ModelConfig) -> LabelHead:
        """A model's, from what `with_labels` put into its configuration."""
        return cls(config.get("labels"), config.get("label_activation"))


def with_labels(config: ModelConfig, hf: Mapping[str, Any]) -> ModelConfig:
    """A model's configuration with what config.json says of labels.

    Raises:
        ValueError: labels whose numbers are not 0, 1, ..., or an activation that is not known.
    """
    names = _labels(hf)
    facts = (("labels", names), ("label_activation", _activation(hf, len(names))))
    return dataclasses.replace(config, extra=(*config.extra, *facts))


def _labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels' names; transformers' default is two, without names."""
    named = {int(number): str(name) for number, name in (hf.get("id2label") or {}).items()}
    if sorted(named) != list(range(len(named))):
        raise ValueError(f"config.json: id2label must number the labels from 0, got {sorted(named)[:8]}.")
    if named:
        return tuple(named[number] for number in range(len(named)))
    return tuple(f"LABEL_{number}" for number in range(hf.get("num_labels") or 2))


def _activation(hf: Mapping[str, Any], count: int) -> str:
    """What sentence-transformers noted, else what the problem's type says; else one label is a score from 0 to 1, and of several
    one is true."""
    noted = (hf.get("sentence_transformers") or {}).get("activation_fn") or hf.get(
        "sbert_ce_default_activation_function"
    )
    if noted:
        name = str(noted).rpartition(".")[2]
        if name not in _NAMED:
            raise ValueError(f"config.json: the activation {noted!r} is not supported; supported: {', '.join(_NAMED)}.")
        return _NAMED[name]
    return _BY_PROBLEM.get(str(hf.get("problem_type")), "sigmoid" if count == 1 else "softmax")
