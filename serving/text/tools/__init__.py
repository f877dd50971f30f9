"""Tool calls and reasoning in a model's replies: one table of families, one streaming parser, one grammar writer."""

from serving.text.tools.choice import ToolPlan, kept_token_ids, plan_tools
from serving.text.tools.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
)
from serving.text.tools.families import detect_reasoning, detect_tools, reasoning_family, tool_family
from serving.text.tools.family import ReasoningFamily, ToolFamily
from serving.text.tools.parser import ReplyParser

__all__ = [
    "ContentDelta",
    "Event",
    "ReasoningDelta",
    "ReasoningFamily",
    "ReplyParser",
    "ToolCallArguments",
    "ToolCallEnd",
    "ToolCallStart",
    "ToolFamily",
    "ToolPlan",
    "detect_reasoning",
    "detect_tools",
    "kept_token_ids",
    "plan_tools",
    "reasoning_family",
    "tool_family",
]
