"""What a `config.json` means where it leaves a field out: the family's own default, which differs between families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.default_names import ALIASES, MODEL_TYPES
from models.default_values import DEFAULTS


def complete(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The dictionary of a `config.json` with its family's defaults and names; as it is where the family is not known.

    Args:
        hf: of a language model alone: what a multimodal one says of its text is unwrapped.
    """
    whole, kind = dict(hf), hf.get("model_type")
    if kind not in DEFAULTS:
        kind = next((MODEL_TYPES[name] for name in hf.get("architectures") or () if name in MODEL_TYPES), None)
    if kind is None:
        return whole
    for other, name in ALIASES.get(kind, {}).items():
        if other in whole:
            whole.setdefault(name, whole[other])
    defaults = dict(DEFAULTS[kind])
    if whole.get("rope_scaling") or whole.get("rope_parameters"):
        defaults.pop("rope_parameters", None)
    return defaults | {name: value for name, value in whole.items() if name != "rope_parameters" or value is not None}
