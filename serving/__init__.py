"""jaxserve: an LLM serving engine on JAX and XLA.

    from serving import LLM, SamplingParams

The names below are imported when first used: `import serving` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.engine.api.adapters import LoRARequest
    from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
    from serving.errors import RequestError
    from serving.llm import LLM
    from serving.service.replies.outputs import CompletionOutput, RequestOutput

_HOME = {
    "LLM": "serving.llm",
    "LoRARequest": "serving.engine.api.adapters",
    "SamplingParams": "serving.engine.api.sampling_params",
    "StructuredOutputs": "serving.engine.api.sampling_params",
    "RequestError": "serving.errors",
    "CompletionOutput": "serving.service.replies.outputs",
    "RequestOutput": "serving.service.replies.outputs",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "LoRARequest",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'serving' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
