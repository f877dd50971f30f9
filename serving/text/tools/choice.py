"""What `tools` and `tool_choice` of a request mean: which calls to look for, and which to enforce."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving.errors import invalid, kind_of
from serving.text.constraints.schema import prepare
from serving.text.constraints.sources import lark_string
from serving.text.grammar import JSON_OPTIONS
from serving.text.tools.families import tool_family
from serving.text.tools.family import Payload, ReasoningFamily, ToolFamily

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer

MAX_PARALLEL_CALLS = 16
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
_NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclasses.dataclass(frozen=True)
class ToolPlan:
    """How to treat a request's tools.

    Attributes:
        family: for `ReplyParser`; None to find no calls.
        schemas: name -> JSON schema of the arguments, of the tools that may be called.
        grammar: for `GrammarCompiler.compile_tools`; None where nothing is enforced.
        offered: whether the chat template should see the tools.
    """

    family: ToolFamily | None
    schemas: Mapping[str, Mapping[str, Any]]
    grammar: str | None
    offered: bool


def plan_tools(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any] | None,
    family: ToolFamily | None,
    tokenizer: Tokenizer,
    *,
    parallel: bool = True,
    reasoning: ReasoningFamily | None = None,
    in_reasoning: bool = False,
    answer: Mapping[str, Any] | None = None,
    allowed: Sequence[str] | None = None,
) -> ToolPlan:
    """Reads `tools` and `tool_choice` in OpenAI's shapes.

    With "required" or a named function the grammar guarantees a call whose arguments satisfy its schema. With "auto"
    nothing is enforced, unless a tool says `"strict": true`: then a call, if there is one, is guaranteed too, as long
    as the family has a marker that shows where it begins.

    Args:
        family: how the model writes calls; None for a model whose template knows none.
        parallel: more than one call is allowed.
        reasoning, in_reasoning: thinking that may come before (see `ReplyParser`).
        allowed: names of those that may be called; the model sees the others too. None: all.
        answer: with "auto", the JSON schema of a reply that is no call: the reply is held to one or the other.
    Raises:
        RequestError: INVALID_ARGUMENT naming what is wrong with `tools` or `tool_choice`.
    """
    schemas = {}
    strict = False
    for i, tool in enumerate(tools or ()):
        name, schema, is_strict = _read_tool(tool, f"tools[{i}]")
        if name in schemas:
            raise invalid(f"tools has two functions named {name!r}.", "tools")
        schemas[name] = schema
        strict = strict or is_strict
    schemas = _allowed(schemas, allowed)
    family = family or tool_family("json")
    choice, named = _read_choice(tool_choice, schemas)
    if choice == "none" or not schemas:
        return ToolPlan(None, {}, None, offered=False)
    if choice == "auto" and answer is None and not (strict and family.begin and not family.bare):
        return ToolPlan(family, schemas, None, offered=True)
    written, read = _writable(family)
    grammar = _Grammar(written, tokenizer, reasoning)
    may_come = {named: schemas[named]} if named is not None else schemas
    once = choice == "named" or not parallel or read.payload is Payload.CHANNELS  # there a call ends the reply
    thinking = _thinking(reasoning, in_reasoning)
    if choice == "auto" and answer is not None:
        return ToolPlan(read, schemas, grammar.either(may_come, once, answer), offered=True)
    if choice == "auto":
        return ToolPlan(read, schemas, grammar.lazy(may_come, once), offered=True)
    return ToolPlan(read, schemas, grammar.required(may_come, once, reasoning, thinking), offered=True)


def kept_token_ids(
    tokenizer: Tokenizer, family: ToolFamily | None, reasoning: ReasoningFamily | None
) -> frozenset[int]:
    """Control tokens that are markers of these families: the detokenizer must keep them for the parser."""
    markers = [*(family.markers if family else ()), *(reasoning.markers if reasoning else ())]
    found = {i: tokenizer.id_to_token(i) for i in tokenizer.special_token_ids}
    return frozenset(i for i, token in found.items() if token and any(token in marker for marker in markers))


# How a call on GPT-OSS's channels is written; how it is read is `channels`' business.
_CHANNEL_CALL = ToolFamily(
    "gpt_oss", Payload.NAMED, begin=("<|channel|>commentary to=functions.",), name_end=" <|constrain|>json<|message|>"
)


def _writable(family: ToolFamily) -> tuple[ToolFamily, ToolFamily]:
    """(the family to enforce, the one to read by): its own, or one with the same markers and JSON inside where the own
    notation cannot be held to a schema."""
    if family.payload in (Payload.JSON, Payload.NAMED):
        return family, family
    if family.payload is Payload.CHANNELS:
        return _CHANNEL_CALL, family
    other = tool_family("hermes" if "<tool_call>" in family.begin else "json")
    return other, other


def _read_tool(tool: Any, where: str) -> tuple[str, Mapping[str, Any], bool]:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or tool.get("type", "function") != "function":
        raise invalid(f'{where} must be {{"type": "function", "function": {{"name": ...}}}}.', "tools")
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise invalid(f"{where}.function.name must be 1 to 256 letters, digits or _-.:/, got {name!r}.", "tools")
    schema = function.get("parameters")
    if schema is None:
        return name, _NO_ARGUMENTS, bool(function.get("strict"))
    if not isinstance(schema, Mapping):
        raise invalid(f"{where}.function.parameters must be a JSON schema, got {kind_of(schema)}.", "tools")
    if schema.get("type", "object") != "object":
        raise invalid(f'{where}.function.parameters must be of type "object", got {schema["type"]!r}.', "tools")
    return name, {"type": "object", **schema}, bool(function.get("strict"))


def _allowed(schemas: dict[str, Any], allowed: Sequence[str] | None) -> dict[str, Any]:
    if allowed is None:
        return schemas
    unknown = [name for name in allowed if name not in schemas]
    if unknown or not allowed:
        what = f"allows {unknown[0]!r}, which is not among the tools" if unknown else "allows no tool: say none instead"
        raise invalid(f"tool_choice {what}.", "tool_choice")
    return {name: schemas[name] for name in allowed}


def _read_choice(choice: Any, schemas: Mapping[str, Any]) -> tuple[str, str | None]:
    """(none, auto, required or named; the name)."""
    if choice is None:
        return ("auto" if schemas else "none"), None
    if choice in ("none", "auto", "required"):
        if choice == "required" and not schemas:
            raise invalid('tool_choice is "required", but there are no tools.', "tool_choice")
        return choice, None
    function = choice.get("function", choice) if isinstance(choice, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str):
        raise invalid(
            f'tool_choice must be "none", "auto", "required" or name a function, got {choice!r}.', "tool_choice"
        )
    if name not in schemas:
        raise invalid(f"tool_choice names {name!r}, which is not among the tools.", "tool_choice")
    return "named", name


def _thinking(reasoning: ReasoningFamily | None, in_reasoning: bool) -> str:
    if reasoning is None:
        return "none"
    return "open" if in_reasoning else "maybe"


class _Grammar:
    """Writes grammars in llguidance's Lark dialect for one family and vocabulary."""

    def __init__(self, family: ToolFamily, tokenizer: Tokenizer, reasoning: ReasoningFamily | None) -> None:
        self._family = family
        tokens = {text: i for text, i in tokenizer.added_tokens.items() if text.strip() and len(text) > 1}
        thought = (reasoning.open, reasoning.close, reasoning.then) if reasoning is not None else ()
        inside = [text for text in tokens if any(text in marker for marker in (*self._texts(family), *thought))]
        self._tokens = {text: tokens[text] for text in inside}
        self._added = tokens
        self._split = re.compile("|".join(map(re.escape, sorted(inside, key=len, reverse=True))) or "(?!)")

    @staticmethod
    def _texts(family: ToolFamily) -> tuple[str, ...]:
        return (*family.begin, family.end, *family.wrap, family.name_prefix, family.name_end)

    def required(self, schemas: Mapping[str, Any], once: bool, reasoning: ReasoningFamily | None, thinking: str) -> str:
        """One call or more, and nothing else but thinking before."""
        lines = ["%llguidance {}"]
        before = ""
        if reasoning is not None and thinking != "none":
            lines += self._thought(reasoning)
            before = "thought " if thinking == "open" else f"({self._text(reasoning.open)} thought)? "
        lines.append(f"start: {before}{self._run(once)}")
        return "\n".join([*lines, *self._calls(schemas)])

    def either(self, schemas: Mapping[str, Any], once: bool, answer: Mapping[str, Any]) -> str:
        """Calls, or a JSON value that satisfies `answer`."""
        text = json.dumps({**prepare(answer, "response_format"), "x-guidance": JSON_OPTIONS})
        start = f"start: answer | {self._run(once)}"
        return "\n".join(["%llguidance {}", start, f"answer: %json {text}", *self._calls(schemas)])

    def lazy(self, schemas: Mapping[str, Any], once: bool) -> str:
        """Any text, in which a marker begins a call."""
        family = self._family
        many = "?" if once else "*"
        opens = family.wrap[0] or family.begin[0]
        if opens in self._added:
            text = [f"start: (TEXT {self._run(once)}){many} TEXT", "TEXT: /(.|\\n)*/"]
        else:
            # The text before a marker that is no token of its own ends at its first occurrence.
            text = [
                f"start: (upto {self._run(once, opened=True)}){many} TEXT",
                f"upto[lazy]: TEXT {lark_string(opens)}",
                "TEXT: /(.|\\n)*/",
            ]
        return "\n".join(["%llguidance {}", *text, *self._calls(schemas)])

    def _thought(self, reasoning: ReasoningFamily) -> list[str]:
        close = reasoning.close
        if close in self._added:
            rule = f"thought: THOUGHT <[{self._added[close]}]> BLANKS {self._text(reasoning.then)}"
        else:
            then = self._text(reasoning.then)
            rule = f"thought: thinking BLANKS {then}\nthinking[lazy]: THOUGHT {lark_string(close)}"
        return [rule, "THOUGHT: /(.|\\n)*/", "BLANKS: /[ \\n]{0,4}/"]

    def _run(self, once: bool, opened: bool = False) -> str:
        """The expression for one call or several, with everything around them."""
        family = self._family
        begin = "" if family.bare or not family.begin else family.begin[0]
        more = "" if once else f"{{0,{MAX_PARALLEL_CALLS - 1}}}"
        if family.lists:
            item = f"call ({lark_string(', ')} call){more}" if more else "call"
            parts = [
                "" if opened else self._text(begin),
                self._text(family.lead),
                '"["',
                item,
                '"]"',
                self._text(family.end),
            ]
        else:
            inside = f"{self._text(family.lead)} call {self._text(family.end)}"
            one = f"{self._text(begin)} {inside}"
            first = inside if opened and not family.wrap[0] else one
            rest = f"({self._text(family.separator)} {one}){more}" if more else ""
            wrap = "" if opened else self._text(family.wrap[0])
            parts = [wrap, first, rest, self._text(family.wrap[1])]
        return " ".join(part for part in parts if part.strip())

    def _calls(self, schemas: Mapping[str, Any]) -> list[str]:
        family = self._family
        lines = ["INDEX: /[0-9]{1,3}/"] if family.numbered else []
        lines += ["call: " + " | ".join(f"call_{i}" for i in range(len(schemas)))]
        for i, (name, schema) in enumerate(schemas.items()):
            if family.payload is Payload.NAMED:
                number = ' ":" INDEX' if family.numbered else ""
                head = f"{self._text(f'{family.name_prefix}{name}')}{number} {self._text(family.name_end)}"
                tail = ""
            else:
                head = lark_string(f'{{"name": {json.dumps(name)}, "{family.arguments_key}": ')
                tail = '"}"'
            # The schema's own options, if it has any, are replaced by ours.
            closed = prepare(schema, "tools", closed=True, what=f"The JSON schema of {name}")
            text = json.dumps({**closed, "x-guidance": JSON_OPTIONS})
            lines += [f"call_{i}: {head} arguments_{i} {tail}", f"arguments_{i}: %json {text}"]
        return lines

    def _text(self, text: str) -> str:
        """`text` as a sequence of literals and of tokens, for the markers in it that are tokens."""
        parts, at = [], 0
        for match in self._split.finditer(text):
            if match.start() > at:
                parts.append(lark_string(text[at : match.start()]))
            parts.append(f"<[{self._tokens[match[0]]}]>")
            at = match.end()
        if at < len(text):
            parts.append(lark_string(text[at:]))
        return " ".join(parts)
