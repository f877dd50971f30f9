"""What every entry goes through: validation, limits, templates to tokens, tokens to text, `n`."""

from serving.service.chat import ChatOptions, prepare_chat
from serving.service.replies.outcome import Choice, Outcome, gather
from serving.service.replies.outputs import (
    Classification,
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
from serving.service.requests.chat_style import ChatStyle
from serving.service.requests.inputs import GenerateInput
from serving.service.requests.limits import Limits
from serving.service.requests.prepare import PreparedRequest
from serving.service.served import Served, stats_of
from serving.service.service import DEFAULT_MODEL, TextService
from serving.service.vectors import ScoreInput

__all__ = [
    "DEFAULT_MODEL",
    "ChatOptions",
    "ChatStyle",
    "Choice",
    "Classification",
    "CompletionOutput",
    "Embedding",
    "GenerateInput",
    "Limits",
    "Logprob",
    "Outcome",
    "PreparedRequest",
    "RequestOutput",
    "ScoreInput",
    "Scores",
    "Served",
    "TextOutput",
    "TextService",
    "TokenLogprob",
    "Usage",
    "collect",
    "gather",
    "prepare_chat",
    "stats_of",
]
