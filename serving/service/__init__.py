"""What every entry goes through: validation, limits, templates to tokens, tokens to text, `n`."""

from serving.service.inputs import GenerateInput
from serving.service.limits import Limits
from serving.service.outputs import (
    CompletionOutput,
    Embedding,
    Logprob,
    RequestOutput,
    TextOutput,
    TokenLogprob,
    Usage,
    collect,
)
from serving.service.prepare import PreparedRequest
from serving.service.service import DEFAULT_MODEL, TextService

__all__ = [
    "DEFAULT_MODEL",
    "CompletionOutput",
    "Embedding",
    "GenerateInput",
    "Limits",
    "Logprob",
    "PreparedRequest",
    "RequestOutput",
    "TextOutput",
    "TextService",
    "TokenLogprob",
    "Usage",
    "collect",
]
