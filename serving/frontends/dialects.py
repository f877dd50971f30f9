"""The dialects of HTTP that are spoken on one port, and how each tells of failures."""

from __future__ import annotations

from serving.frontends.anthropic import errors as anthropic
from serving.frontends.http.errors import ErrorShapes
from serving.frontends.ollama import errors as ollama
from serving.frontends.openai import errors as openai

ERROR_SHAPES = ErrorShapes(
    openai.SHAPE, ((anthropic.speaks_anthropic, anthropic.SHAPE), (ollama.speaks_ollama, ollama.SHAPE))
)
