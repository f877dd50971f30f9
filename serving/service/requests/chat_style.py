"""How the served model writes tool calls and reasoning."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from serving.text.tools import (
    ReasoningFamily,
    ToolFamily,
    detect_reasoning,
    detect_tools,
    kept_token_ids,
    reasoning_family,
    tool_family,
)

if TYPE_CHECKING:
    from serving.text.chat_template import ChatTemplate
    from serving.text.tokenizer import Tokenizer

FALLBACK_TOOLS = "json"
"""For models whose template shows no known way to write calls: a JSON object with the name of an offered tool."""


@dataclasses.dataclass(frozen=True)
class ChatStyle:
    """How the served model writes tool calls and reasoning.

    Attributes:
        tools: also for models that show no style of their own, so that calls can be forced.
        reasoning: None for models that do not think aloud.
        markers: control tokens that mark calls or thinking: they stay in the text that is parsed.
    """

    tools: ToolFamily
    reasoning: ReasoningFamily | None
    markers: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        template: ChatTemplate | None,
        tokenizer: Tokenizer,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> ChatStyle:
        """The style that the chat template shows, or those named (a family's name or vLLM's for its parser).

        Raises:
            ValueError: there is no parser of that name; the sentence lists those there are.
        """
        source = getattr(template, "source", "") or ""
        tools = tool_family(tool_parser, source) if tool_parser else detect_tools(source) or tool_family(FALLBACK_TOOLS)
        reasoning = reasoning_family(reasoning_parser) if reasoning_parser else detect_reasoning(source)
        return cls(tools, reasoning, kept_token_ids(tokenizer, tools, reasoning))
