"""How each model family writes tool calls and reasoning, as a table. `detect` picks a row by the chat template."""

from __future__ import annotations

import dataclasses
import enum
from typing import TypeVar


class Payload(enum.Enum):
    """What stands between a call's markers."""

    JSON = "json"  # {"name": ..., "arguments": {...}}, or a list of them
    NAMED = "named"  # a name, a separator, a JSON object
    TAGGED = "tagged"  # a name and one tagged text per argument
    PYTHON = "python"  # [f(a=1), g(b="x")]
    BRACED = "braced"  # call:f{a:1,b:<escape>x<escape>}


@dataclasses.dataclass(frozen=True)
class Tags:
    """The pieces of a TAGGED payload, in their order."""

    name_open: str
    name_close: str
    key_open: str
    key_close: str
    value_open: str
    value_close: str
    args_close: str


@dataclasses.dataclass(frozen=True)
class ToolFamily:
    """One way to write tool calls.

    Attributes:
        name: ours; `aliases` are vLLM's names of parsers that read the same.
        begin: markers that open a call; the first is the one to write, unless `bare`.
        lead: what is written between `begin` and the payload.
        bare: a reply that starts with the payload is a call, without a marker.
        end: what follows a call's payload.
        wrap: what opens and closes a run of calls.
        separator: what stands between calls.
        template_has: texts that a chat template of this family contains, all of them.
        name_prefix, name_end: around the name of a NAMED payload.
        arguments_key: what a JSON payload calls the arguments; all common keys are read.
        lists: calls of a JSON payload stand in one list.
        string_quote: what quotes a text in a BRACED payload.
        id_length: 0 for ids as OpenAI's, else so many letters and digits, which the templates of some models demand.
    """

    name: str
    payload: Payload
    begin: tuple[str, ...] = ()
    lead: str = ""
    bare: bool = False
    end: str = ""
    wrap: tuple[str, str] = ("", "")
    separator: str = "\n"
    template_has: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    name_prefix: str = ""
    name_end: str = ""
    arguments_key: str = "arguments"
    lists: bool = False
    tags: Tags | None = None
    string_quote: str = '"'
    id_length: int = 0

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text that has a meaning here and may be a control token, which must then not be left out of the
        text that is parsed."""
        own = (*self.begin, self.end, *self.wrap, self.name_prefix, self.name_end, self.string_quote)
        tagged = dataclasses.astuple(self.tags) if self.tags is not None else ()
        return tuple(dict.fromkeys(text.strip() for text in (*own, *tagged) if text.strip()))


@dataclasses.dataclass(frozen=True)
class ReasoningFamily:
    """Thinking before the answer, between two markers."""

    name: str
    open: str
    close: str
    aliases: tuple[str, ...] = ()

    def opened_by(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside the thinking, so that the completion starts there."""
        return prompt.rstrip().endswith(self.open)

    @property
    def markers(self) -> tuple[str, ...]:
        return self.open, self.close


# Order matters to `detect`: the first whose texts are all in the template.
TOOL_FAMILIES: tuple[ToolFamily, ...] = (
    ToolFamily(
        "qwen3_coder",
        Payload.TAGGED,
        begin=("<tool_call>",),
        end="</tool_call>",
        template_has=("<tool_call>", "<function=", "<parameter="),
        aliases=("qwen3_xml", "step3p5", "nemotron_v3"),
        tags=Tags("\n<function=", ">\n", "<parameter=", ">", "\n", "\n</parameter>\n", "</function>\n"),
    ),
    ToolFamily(
        "glm",
        Payload.TAGGED,
        begin=("<tool_call>",),
        end="</tool_call>",
        template_has=("<tool_call>", "<arg_key>", "<arg_value>"),
        aliases=("glm45", "glm47"),
        tags=Tags("", "\n", "<arg_key>", "</arg_key>\n", "<arg_value>", "</arg_value>\n", ""),
    ),
    ToolFamily(
        "hermes",
        Payload.JSON,
        begin=("<tool_call>",),
        lead="\n",
        end="\n</tool_call>",
        template_has=("<tool_call>",),
        aliases=("qwen", "qwen2", "qwen2_5", "qwen3", "longcat"),
    ),
    ToolFamily(
        "mistral_named",
        Payload.NAMED,
        begin=("[TOOL_CALLS]",),
        separator="",
        name_end="[ARGS]",
        template_has=("[TOOL_CALLS]", "[ARGS]"),
        aliases=("mistral_v11", "mistral_v13"),
        id_length=9,
    ),
    ToolFamily(
        "mistral",
        Payload.JSON,
        begin=("[TOOL_CALLS]",),
        separator=", ",
        lists=True,
        template_has=("[TOOL_CALLS]",),
        id_length=9,
    ),
    ToolFamily(
        "deepseek_v3",
        Payload.NAMED,
        begin=("<｜tool▁call▁begin｜>",),
        end="\n```<｜tool▁call▁end｜>",
        wrap=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        name_prefix="function<｜tool▁sep｜>",
        name_end="\n```json\n",
        template_has=("<｜tool▁calls▁begin｜>", "```json"),
        aliases=("deepseek", "deepseek_r1"),
    ),
    ToolFamily(
        "deepseek_v31",
        Payload.NAMED,
        begin=("<｜tool▁call▁begin｜>",),
        end="<｜tool▁call▁end｜>",
        wrap=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        separator="",
        name_end="<｜tool▁sep｜>",
        template_has=("<｜tool▁calls▁begin｜>",),
    ),
    ToolFamily(
        "kimi_k2",
        Payload.NAMED,
        begin=("<|tool_call_begin|>",),
        end="<|tool_call_end|>",
        wrap=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        separator="",
        name_prefix="functions.",
        name_end="<|tool_call_argument_begin|>",
        template_has=("<|tool_calls_section_begin|>",),
    ),
    ToolFamily(
        "functiongemma",
        Payload.BRACED,
        begin=("<start_function_call>",),
        end="<end_function_call>",
        separator="",
        string_quote="<escape>",
        template_has=("<start_function_call>",),
        aliases=("gemma",),
    ),
    ToolFamily(
        "gemma4",
        Payload.BRACED,
        begin=("<|tool_call>",),
        end="<tool_call|>",
        separator="",
        string_quote='<|"|>',
        template_has=("<|tool_call>", "<tool_call|>"),
    ),
    ToolFamily(
        "gemma3",
        Payload.PYTHON,
        begin=("```tool_code\n",),
        end="\n```",
        template_has=("```tool_code",),
        aliases=("tool_code",),
    ),
    ToolFamily(
        "phi4_mini",
        Payload.JSON,
        begin=("functools",),
        separator=", ",
        lists=True,
        template_has=("functools[",),
        aliases=("phi4_mini_json",),
    ),
    ToolFamily(
        "granite",
        Payload.JSON,
        begin=("<|tool_call|>", "<tool_call>"),
        separator=", ",
        lists=True,
        template_has=("<|tool_call|>",),
    ),
    ToolFamily(
        "jamba",
        Payload.JSON,
        begin=("<tool_calls>",),
        end="</tool_calls>",
        separator=", ",
        lists=True,
        template_has=("<tool_calls>",),
    ),
    ToolFamily(
        "internlm",
        Payload.JSON,
        begin=("<|action_start|><|plugin|>",),
        end="<|action_end|>",
        arguments_key="parameters",
        template_has=("<|action_start|>", "<|plugin|>"),
    ),
    ToolFamily(
        "pythonic",
        Payload.PYTHON,
        begin=("<|python_start|>",),
        bare=True,
        end="<|python_end|>",
        template_has=("func_name1(params_name1=params_value1",),
        aliases=("llama4_pythonic", "olmo3", "lfm2"),
    ),
    ToolFamily(
        "llama3_json",
        Payload.JSON,
        begin=("<|python_tag|>",),
        bare=True,
        separator="; ",
        arguments_key="parameters",
        template_has=("<|start_header_id|>", '"parameters"'),
        aliases=("llama3", "llama4_json"),
    ),
    # For models whose template knows no tools: it can be enforced all the same, and a reply that is such an object
    # with the name of an offered tool is a call.
    ToolFamily("json", Payload.JSON, bare=True, aliases=("xlam",)),
)

REASONING_FAMILIES: tuple[ReasoningFamily, ...] = (
    ReasoningFamily(
        "think",
        "<think>",
        "</think>",
        aliases=(
            *("deepseek_r1", "deepseek_v3", "qwen3", "glm45", "granite", "hunyuan_a13b", "nemotron_v3", "olmo3"),
            *("step3", "holo2", "kimi_k2", "minimax_m2", "ernie45", "mimo"),
        ),
    ),
    ReasoningFamily("mistral_think", "[THINK]", "[/THINK]", aliases=("mistral",)),
    ReasoningFamily("seed_think", "<seed:think>", "</seed:think>", aliases=("seed_oss",)),
)


def detect_tools(template: str) -> ToolFamily | None:
    """The family whose markers are in a chat template's source; None where no known one is."""
    for family in TOOL_FAMILIES:
        if family.template_has and all(text in template for text in family.template_has):
            return family
    return None


def detect_reasoning(template: str) -> ReasoningFamily | None:
    """The same for reasoning."""
    for family in REASONING_FAMILIES:
        if family.open in template or family.close in template:
            return family
    return None


def tool_family(name: str) -> ToolFamily:
    """A family by its name or an alias.

    Raises:
        ValueError: there is none; the sentence lists those there are.
    """
    return _by_name(name, TOOL_FAMILIES, "tool-call parser")


def reasoning_family(name: str) -> ReasoningFamily:
    """A reasoning family by its name or an alias. Raises ValueError as `tool_family`."""
    return _by_name(name, REASONING_FAMILIES, "reasoning parser")


_Family = TypeVar("_Family", ToolFamily, ReasoningFamily)


def _by_name(name: str, families: tuple[_Family, ...], what: str) -> _Family:
    for family in families:
        if name == family.name or name in family.aliases:
            return family
    known = sorted({n for family in families for n in (family.name, *family.aliases)})
    raise ValueError(f"There is no {what} named {name!r}; there are {', '.join(known)}.")
