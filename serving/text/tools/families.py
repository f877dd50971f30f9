"""How each model family writes tool calls and reasoning, as a table. `detect` picks a row by the chat template."""

from __future__ import annotations

from typing import TypeVar

from serving.text.tools.family import Payload, ReasoningFamily, Tags, ToolFamily

# Order matters to `detect`: the first whose texts are all in the template.
TOOL_FAMILIES: tuple[ToolFamily, ...] = (
    ToolFamily(
        "qwen3_coder",
        Payload.TAGGED,
        begin=("<tool_call>",),
        end="</tool_call>",
        template_has=("<tool_call>", "<function=", "<parameter="),
        aliases=("qwen3_xml", "step3p5", "nemotron_v3", "mimo"),
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
        "seed_oss",
        Payload.TAGGED,
        begin=("<seed:tool_call>",),
        end="</seed:tool_call>",
        template_has=("<seed:tool_call>",),
        tags=Tags("\n<function=", ">\n", "<parameter=", ">", "", "</parameter>\n", "</function>\n"),
    ),
    ToolFamily(
        "minimax_m2",
        Payload.TAGGED,
        end="",
        wrap=("<minimax:tool_call>", "</minimax:tool_call>"),
        template_has=("minimax:tool_call", "<invoke name="),
        aliases=("minimax",),
        tags=Tags('<invoke name="', '">\n', '<parameter name="', '">', "", "</parameter>\n", "</invoke>\n"),
    ),
    ToolFamily(
        "deepseek_v32",
        Payload.TAGGED,
        end="",
        wrap=("<｜DSML｜function_calls>", "</｜DSML｜function_calls>"),
        template_has=("DSML",),
        tags=Tags(
            *('<｜DSML｜invoke name="', '">\n', '<｜DSML｜parameter name="', '">'),
            *("", "</｜DSML｜parameter>\n", "</｜DSML｜invoke>\n"),
        ),
    ),
    ToolFamily(
        "gpt_oss",
        Payload.CHANNELS,
        template_has=("<|channel|>", "<|message|>"),
        aliases=("openai",),
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
        id_mark="[CALL_ID]",
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
        numbered=True,
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
        "lfm2",
        Payload.PYTHON,
        begin=("<|tool_call_start|>",),
        end="<|tool_call_end|>",
        template_has=("<|tool_call_start|>",),
    ),
    ToolFamily(
        "olmo3",
        Payload.PYTHON,
        begin=("<function_calls>",),
        end="</function_calls>",
        template_has=("<function_calls>",),
    ),
    ToolFamily(
        "pythonic",
        Payload.PYTHON,
        begin=("<|python_start|>",),
        bare=True,
        end="<|python_end|>",
        template_has=("func_name1(params_name1=params_value1",),
        aliases=("llama4_pythonic",),
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
    ReasoningFamily("gemma4", "<|channel>thought\n", "<channel|>"),
    ReasoningFamily(
        "gpt_oss",
        "<|channel|>analysis<|message|>",
        "<|end|>",
        aliases=("openai_gptoss", "gptoss", "openai"),
        then="<|start|>assistant",
    ),
    ReasoningFamily("kimi", "◁think▷", "◁/think▷"),
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
        # Where the closing marker closes other messages too, it says nothing.
        if family.open in template or (not family.then and family.close in template):
            return family
    return None


def tool_family(name: str, template: str = "") -> ToolFamily:
    """A family by its name or an alias.

    Args:
        template: the model's chat template. `mistral` is one name, as in vLLM, for all that Mistral's models have written: where
            the template has their later form, that is meant.
    Raises:
        ValueError: there is none; the sentence lists those there are.
    """
    family, found = _by_name(name, TOOL_FAMILIES, "tool-call parser"), detect_tools(template)
    return found if found is not None and found.name == f"{family.name}_named" else family


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
