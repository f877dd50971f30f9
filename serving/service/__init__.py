"""What every entry goes through: validation, limits, templates to tokens, tokens to text, `n`."""

from serving.service.chat import ChatOptions, prepare_chat
from serving.service.chat_style import ChatStyle
from serving.service.inputs import GenerateInput
from serving.service.limits import Limits
from serving.service.outputs import (
    CompletionOutput,
    Embedding,
    Logprob,
    RequestOutput,
    Scores,
    TextOutput,
    TokenLogprob,
    Usage,
    collect,
)
from serving.service.prepare import PreparedRequest
from serving.service.service import DEFAULT_MODEL, TextService
from serving.service.vectors import ScoreInput

__all__ = [
    "DEFAULT_MODEL",
    "ChatOptions",
    "ChatStyle",
    "CompletionOutput",
    "Embedding",
    "GenerateInput",
    "Limits",
    "Logprob",
    "PreparedRequest",
    "RequestOutput",
    "ScoreInput",
    "Scores",
    "TextOutput",
    "TextService",
    "TokenLogprob",
    "Usage",
    "collect",
    "prepare_chat",
]
