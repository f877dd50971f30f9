"""Streams of completions read to their end, for replies that come in one piece."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator

from serving.engine.api.types import FinishReason, TransferParams
from serving.service.replies.outputs import TextOutput, TokenLogprob, Usage
from serving.text.tools.reply import Message


@dataclasses.dataclass
class Choice:
    """One completion, whole; `message` where content, thinking and calls are told apart."""

    text: str = ""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    message: Message | None = None
    called: bool = False

    def add(self, output: TextOutput) -> None:
        self.text += output.text
        if output.events is not None:
            self.message = self.message or Message()
            self.message.add(output.events)
            self.called = output.called
        self.token_ids.extend(output.token_ids)
        if output.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *output.logprobs]
        if output.finish_reason is not None:
            self.finish_reason, self.stop_reason = output.finish_reason, output.stop_reason


@dataclasses.dataclass
class Outcome:
    """All completions of one prompt."""

    choices: list[Choice]
    usage: Usage = dataclasses.field(default_factory=Usage)
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    transfer: TransferParams | None = None

    def add(self, output: TextOutput) -> None:
        self.usage.add(output)
        self.choices[output.index].add(output)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        self.transfer = self.transfer or output.transfer


async def gather(n: int, stream: AsyncGenerator[TextOutput, None]) -> Outcome:
    """Reads a stream of `n` completions to its end. Raises RequestError as the stream does."""
    outcome = Outcome([Choice() for _ in range(n)])
    async for output in stream:
        outcome.add(output)
    return outcome
