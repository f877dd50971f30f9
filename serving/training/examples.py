"""Training data: lines of JSON to token ids, and which of them the loss is on.

A line is a chat (`messages`, and `tools`), a plain text (`text`), a `prompt` with its `completion` (texts, or both lists of
messages), or for embedding models a `query` (or `anchor`) with its `positive` and maybe a `negative`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from serving.errors import RequestError
from serving.text.chat_template import ChatTemplate
from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
    """One text to learn.

    Attributes:
        tokens_N: int32 ids.
        learned_N: bool, whether the loss is on predicting that token. Never on the first.
        line: where it came from, for messages.
    """

    tokens_N: np.ndarray
    learned_N: np.ndarray
    line: int


@dataclasses.dataclass(frozen=True)
class Pair:
    """Texts that an embedding model is to bring together, and one that it is to keep away: token ids as the model reads them."""

    query: tuple[int, ...]
    positive: tuple[int, ...]
    negative: tuple[int, ...] | None
    line: int


@dataclasses.dataclass(frozen=True)
class Reader:
    """How lines become token ids.

    Attributes:
        template: of chats; None for a model without one.
        template_arguments: more variables for it (`enable_thinking`, ...).
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def examples(self, path: Path) -> list[Example]:
        """Everything to learn in a file.

        Raises:
            ValueError: a line that is no example, by its number.
        """
        return [example for line, fields in lines(path) for example in _told(path, line, self._examples, fields)]

    def pairs(self, path: Path) -> list[Pair]:
        """All pairs of a file.

        Raises:
            ValueError: a line that is no pair, by its number; some lines with negatives and some without.
        """
        pairs = [pair for line, fields in lines(path) for pair in _told(path, line, self._pair, fields)]
        if len({pair.negative is None for pair in pairs}) > 1:
            odd = next(pair for pair in pairs if (pair.negative is None) != (pairs[0].negative is None))
            raise ValueError(f"{path} line {odd.line}: either all lines have a negative or none.")
        return pairs

    def _examples(self, fields: Mapping[str, Any], line: int) -> list[Example]:
        if "messages" in fields:
            return self._chat(fields["messages"], fields.get("tools"), 0, line)
        if "text" in fields:
            tokens = self._ended(self._ids(_text(fields, "text")))
            return [Example(np.array(tokens, np.int32), np.arange(len(tokens)) > 0, line)]
        if "prompt" not in fields or "completion" not in fields:
            raise ValueError('it has none of "messages", "text" and "prompt" with "completion".')
        prompt, completion = fields["prompt"], fields["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._chat([*prompt, *completion], fields.get("tools"), len(prompt), line)
        before = self._ids(_text(fields, "prompt"))
        if len(before) > 1 and before[-1] in self.tokenizer.eos_token_ids:
            before = before[:-1]  # what some tokenizers put behind every text
        after = self._ended(self.tokenizer.encode(_text(fields, "completion"), False, parse_special=True))
        tokens = np.array([*before, *after], np.int32)
        return [Example(tokens, np.arange(len(tokens)) >= max(1, len(before)), line)]

    def _ids(self, text: str) -> list[int]:
        """A text as training data has them: with the control tokens that are written in it, and one BOS."""
        bos = self.tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        return self.tokenizer.encode(text, not has_bos, parse_special=True)

    def _ended(self, tokens: list[int]) -> list[int]:
        ends = self.tokenizer.eos_token_ids
        return tokens if not ends or (tokens and tokens[-1] in ends) else [*tokens, ends[0]]

    def _pair(self, fields: Mapping[str, Any], line: int) -> list[Pair]:
        query = "query" if "query" in fields else "anchor"
        if query not in fields or "positive" not in fields:
            raise ValueError('it has no "query" (or "anchor") with a "positive".')
        names = [query, "positive", *(["negative"] if fields.get("negative") is not None else [])]
        ids = [tuple(self.tokenizer.encode_pair(_text(fields, name))[0]) for name in names]
        return [Pair(ids[0], ids[1], ids[2] if len(ids) > 2 else None, line)]

    def _chat(self, messages: Any, tools: Any, first: int, line: int) -> list[Example]:
        """One example, or one an answer where the template writes earlier turns otherwise than the last.

        Args:
            first: messages before it are not learned.
        """
        if self.template is None:
            raise ValueError("the model has no chat template; give one with --chat-template, or train on texts.")
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise ValueError('"messages" must be a list of objects.')
        if tools is not None and not isinstance(tools, list):
            raise ValueError('"tools" must be a list.')
        messages = [dict(message) for message in messages]
        weights = [message.pop("weight", 1) for message in messages]
        answers = [
            index
            for index, (message, weight) in enumerate(zip(messages, weights, strict=True))
            if message.get("role") == "assistant" and index >= first and weight
        ]
        if not answers:
            raise ValueError("it has no assistant message to learn.")
        whole = self._rendered(messages, tools, False)
        spans = [self._span(messages, tools, index) for index in answers]
        if all(whole[: span.end] == span.tokens[: span.end] for span in spans):
            learned = np.zeros(len(whole), bool)
            for span in spans:
                learned[span.begin : span.end] = True
            return [Example(np.array(whole, np.int32), learned, line)]
        return [span.example(line) for span in spans]

    def _rendered(self, messages: Sequence[Mapping[str, Any]], tools: Any, open_answer: bool) -> list[int]:
        assert self.template is not None
        return self.template.encode(
            self.tokenizer, messages, tools=tools, add_generation_prompt=open_answer, **self.template_arguments
        )[1]

    def _span(self, messages: Sequence[Mapping[str, Any]], tools: Any, index: int) -> _Span:
        """The chat up to an answer, and where in it the answer is: behind what it shares with the prompt that a server would make
        of the messages before."""
        if index == 0:
            raise ValueError("it begins with an assistant message: nothing asks for it (give it a weight of 0).")
        prompt = self._rendered(messages[:index], tools, True)
        tokens = self._rendered(messages[: index + 1], tools, False)
        begin = shared(prompt, tokens)
        if begin == len(tokens) or begin < len(prompt) - MAX_REWRITTEN:
            raise ValueError(f"the chat template does not put messages[{index}] behind the prompt that asks for it.")
        return _Span(tokens, begin, self._end(tokens, begin))

    def _end(self, tokens: Sequence[int], begin: int) -> int:
        """Behind the control token that ends the answer: a model that has said it is not asked for what a template writes next."""
        end = len(tokens)
        while end > begin and tokens[end - 1] not in self.tokenizer.special_token_ids:
            if self.tokenizer.decode(tokens[end - 1 : end], skip_special_tokens=False).strip():
                return len(tokens)
            end -= 1
        return end if end > begin else len(tokens)


MAX_REWRITTEN = 16
"""Tokens at the end of a prompt that a template may write otherwise once the answer is there (an empty thought, say)."""


@dataclasses.dataclass(frozen=True)
class _Span:
    tokens: list[int]
    begin: int
    end: int

    def example(self, line: int) -> Example:
        index = np.arange(len(self.tokens))
        return Example(np.array(self.tokens, np.int32), (index >= self.begin) & (index < self.end), line)


def shared(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)


def lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, object) of each line that is not blank.

    Raises:
        ValueError: the file cannot be read, or a line is no JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path} cannot be read: {reason}.") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply"
            raise ValueError(f"{path} line {number} is not JSON: {reason}.") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{path} line {number} is not a JSON object.")
        yield number, fields


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value:
        raise ValueError(f'"{name}" must be a text that is not empty.')
    return value


def _told(path: Path, line: int, read: Callable[[Mapping[str, Any], int], Iterable[Any]], fields: Any) -> Iterable[Any]:
    """What a line is read as; whatever is wrong with it is said with its number."""
    try:
        return read(fields, line)
    except (ValueError, RequestError) as error:
        raise ValueError(f"{path} line {line}: {error}") from None
