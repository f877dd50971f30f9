"""What describes how a model family writes tool calls and reasoning. The families themselves are in `families`."""

from __future__ import annotations

import dataclasses
import enum


class Payload(enum.Enum):
    """What stands between a call's markers."""

    JSON = "json"  # {"name": ..., "arguments": {...}}, or a list of them
    NAMED = "named"  # a name, a separator, a JSON object
    TAGGED = "tagged"  # a name and one tagged text per argument
    PYTHON = "python"  # [f(a=1), g(b="x")]
    BRACED = "braced"  # call:f{a:1,b:<escape>x<escape>}
    CHANNELS = "channels"  # messages on channels, some of them to a tool: see `channels`


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
        id_mark: stands between the name of a NAMED payload and the call's id, where the model writes one.
        numbered: the name of a NAMED payload is written `functions.f:0`, which is the call's id too.
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
    id_mark: str = ""
    numbered: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """Every text that has a meaning here and may be a control token, which must then not be left out of the
        text that is parsed."""
        if self.payload is Payload.CHANNELS:
            return ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
        own = (*self.begin, self.end, *self.wrap, self.name_prefix, self.name_end, self.id_mark, self.string_quote)
        tagged = dataclasses.astuple(self.tags) if self.tags is not None else ()
        return tuple(dict.fromkeys(text.strip() for text in (*own, *tagged) if text.strip()))


@dataclasses.dataclass(frozen=True)
class ReasoningFamily:
    """Thinking before the answer, between two markers.

    Attributes:
        then: what a model writes between the thinking and a call.
    """

    name: str
    open: str
    close: str
    aliases: tuple[str, ...] = ()
    then: str = ""

    def opened_by(self, prompt: str) -> bool:
        """Whether a rendered prompt ends inside the thinking, so that the completion starts there."""
        return prompt.rstrip().endswith(self.open.rstrip())

    @property
    def markers(self) -> tuple[str, ...]:
        return self.open, self.close
