"""From one sequence's tokens to text: detokenizing, stop strings, logprobs with their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, FinishReason, TokenLogprobs
from serving.service.replies.outputs import TextOutput, TokenLogprob
from serving.service.replies.stop_strings import StopMatcher
from serving.text.detokenizer import IncrementalDetokenizer
from serving.text.tools import ContentDelta, Event
from serving.text.tools.reply import ReplyReader

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer


class TextStream:
    """Turns the engine's outputs of one sequence into text outputs.

    Args:
        markers: control tokens that stay in the text even where special tokens are left out.
        reader: tells content, thinking and calls apart: stop strings then end the content alone.
        continues: the text goes on with the prompt's: a blank at its beginning stays.
    Attributes:
        stopped: a stop string was found: the engine's request is to be ended, its further outputs are not wanted.
    """

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        eos_token_ids: tuple[int, ...],
        tokenizer: Tokenizer,
        markers: frozenset[int] = frozenset(),
        reader: ReplyReader | None = None,
        continues: bool = False,
    ) -> None:
        self._reader = reader
        self._written: list[str] = []
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = (
            IncrementalDetokenizer(
                tokenizer, skip_special_tokens=params.skip_special_tokens, keep=markers, continues=continues
            )
            if params.detokenize
            else None
        )
        self._matcher = (
            StopMatcher(params.stop_strings, params.include_stop_str_in_output) if params.stop_strings else None
        )
        ends = set(params.stop_token_ids)
        self._ends = ends if params.ignore_eos else ends | set(eos_token_ids)
        self._count = 0
        self._num_chars = 0  # of the text decoded so far
        self._starts: list[int] = []  # what it was before each token of this output
        self.stopped = False

    def push(self, output: EngineOutput) -> TextOutput:
        """Takes the engine's next output; the last one has a finish reason."""
        self._starts.clear()
        if self._reader is not None:
            return self._push_read(self._reader, output)
        if self._matcher is not None:
            text, used = self._match(output)
        elif output.logprobs is not None:
            text, used = "".join([self._decode((token,)) for token in self._visible(output)]), len(output.token_ids)
        else:
            text, used = self._decode(self._visible(output)), len(output.token_ids)
        finish, stop_reason = output.finish_reason, output.stop_reason
        if finish is not None and not self.stopped:
            text += self._flush()
        if self._matcher is not None and self._matcher.matched is not None:
            self.stopped = True
            finish, stop_reason = FinishReason.STOP, self._matcher.matched
        return self._output(output, text, used, finish, stop_reason)

    def _output(
        self,
        output: EngineOutput,
        text: str,
        used: int,
        finish: FinishReason | None,
        stop_reason: int | str | None,
        **more: Any,
    ) -> TextOutput:
        self._count += used
        return TextOutput(
            index=self._index,
            text=text,
            token_ids=output.token_ids[:used],
            logprobs=self._logprobs(output.logprobs, used),
            prompt_logprobs=self._prompt_logprobs(output) if self._index == 0 else None,
            finish_reason=finish,
            stop_reason=stop_reason,
            num_prompt_tokens=output.num_prompt_tokens,
            num_cached_tokens=output.num_cached_tokens,
            num_completion_tokens=self._count,
            times=output.times,
            accepted_drafts=output.accepted_drafts,
            rejected_drafts=output.rejected_drafts,
            transfer=output.transfer,
            **more,
        )

    def _push_read(self, reader: ReplyReader, output: EngineOutput) -> TextOutput:
        """As `push`, token by token through the reader."""
        events: list[Event] = []
        thought = reader.reasoning_tokens
        used = len(output.token_ids)
        for i, token in enumerate(self._visible(output)):
            piece = self._decode((token,))
            self._written.append(piece)
            early = self._count + i + 1 < self._params.min_tokens
            events += self._up_to_stop(reader.push(piece), early)
            if self.stopped:
                used = i + 1
                break
        finish, stop_reason = output.finish_reason, output.stop_reason
        if finish is not None and not self.stopped:
            tail = self._detokenizer.finish() if self._detokenizer is not None else ""
            self._written.append(tail)
            events += self._up_to_stop([*reader.push(tail, 0), *reader.finish()], early=False)
            if self._matcher is not None and not self.stopped and (held := self._matcher.finish()):
                events.append(ContentDelta(held))
        matched = self._matcher.matched if self._matcher is not None else None
        if matched is not None:
            finish, stop_reason = FinishReason.STOP, matched
        text = ""
        if self._matcher is None or finish is not None:
            text = "".join(self._written)
            self._written.clear()
        if matched is not None:
            at = text.rfind(matched)
            text = text[: at + (len(matched) if self._params.include_stop_str_in_output else 0)] if at >= 0 else text
        return self._output(
            output, text, used, finish, stop_reason,
            events=tuple(events), called=reader.called, num_reasoning_tokens=reader.reasoning_tokens - thought,
        )  # fmt: skip

    def _up_to_stop(self, events: list[Event], early: bool) -> list[Event]:
        """The events up to a stop string in their content, which sets `stopped`.

        Args:
            early: fewer than `min_tokens` tokens came: nothing ends it yet.
        """
        if self._matcher is None or early:
            return events
        out: list[Event] = []
        for event in events:
            text = self._matcher.push(event.text) if isinstance(event, ContentDelta) else self._matcher.finish()
            if text:
                out.append(ContentDelta(text))
            if self._matcher.matched is not None:
                self.stopped = True  # and nothing behind it counts
                break
            if not isinstance(event, ContentDelta):
                out.append(event)
        return out

    def _visible(self, output: EngineOutput) -> tuple[int, ...]:
        """The tokens whose text is shown: all but the end-of-sequence or stop token that ended the completion."""
        ids = output.token_ids
        ended = output.finish_reason is FinishReason.STOP and ids and ids[-1] in self._ends
        return ids[:-1] if ended and not self._params.include_stop_str_in_output else ids

    def _match(self, output: EngineOutput) -> tuple[str, int]:
        """Token by token, because the tokens behind a stop string are not part of the completion."""
        matcher, texts = self._matcher, []
        assert matcher is not None
        for i, token in enumerate(self._visible(output)):
            piece = self._decode((token,))
            if self._count + i + 1 < self._params.min_tokens:
                texts.append(piece)
                continue
            texts.append(matcher.push(piece))
            if matcher.matched is not None:
                self.stopped = True  # and nothing of this output behind this token counts
                return "".join(texts), i + 1
        return "".join(texts), len(output.token_ids)

    def _decode(self, ids: tuple[int, ...]) -> str:
        if self._detokenizer is None or not ids:
            return ""
        self._starts.append(self._num_chars)
        text = self._detokenizer.push(ids)
        self._num_chars += len(text)
        return text

    def _flush(self) -> str:
        """The text that was held back, at the end of a completion. A stop string may still complete in it."""
        tail = self._detokenizer.finish() if self._detokenizer is not None else ""
        if self._matcher is None:
            return tail
        return self._matcher.push(tail) + self._matcher.finish()

    def _logprobs(self, entries: tuple[TokenLogprobs, ...] | None, used: int) -> tuple[TokenLogprob, ...] | None:
        if entries is None or self._params.logprobs is None:
            return None
        starts = self._starts + [self._num_chars] * (used - len(self._starts))  # an ending token has no text
        return tuple(self._logprob(entry, start) for entry, start in zip(entries[:used], starts, strict=False))

    def _prompt_logprobs(self, output: EngineOutput) -> tuple[TokenLogprob | None, ...] | None:
        if output.prompt_logprobs is None:
            return None
        return tuple(entry and self._logprob(entry) for entry in output.prompt_logprobs)

    def _logprob(self, entry: TokenLogprobs, start: int = 0) -> TokenLogprob:
        top = tuple(self._named(token, logprob, i + 1) for i, (token, logprob) in enumerate(entry.top))
        return self._named(entry.token_id, entry.logprob, entry.rank, top, start)

    def _named(
        self, token: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = (), start: int = 0
    ) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(token)
        return TokenLogprob(token, raw.decode("utf-8", errors="replace"), raw, logprob, rank, top, start)
