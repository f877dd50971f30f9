"""From one sequence's tokens to text: detokenizing, stop strings, logprobs with their texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, FinishReason, TokenLogprobs
from serving.service.outputs import TextOutput, TokenLogprob
from serving.service.stop_strings import StopMatcher
from serving.text.detokenizer import IncrementalDetokenizer

if TYPE_CHECKING:
    from serving.text.tokenizer import Tokenizer


class TextStream:
    """Turns the engine's outputs of one sequence into text outputs.

    Args:
        markers: control tokens that stay in the text even where special tokens are left out.
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
    ) -> None:
        self._index = index
        self._params = params
        self._tokenizer = tokenizer
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens, keep=markers)
            if params.detokenize
            else None
        )
        self._matcher = (
            StopMatcher(params.stop_strings, params.include_stop_str_in_output) if params.stop_strings else None
        )
        ends = set(params.stop_token_ids)
        self._ends = ends if params.ignore_eos else ends | set(eos_token_ids)
        self._count = 0
        self.stopped = False

    def push(self, output: EngineOutput) -> TextOutput:
        """Takes the engine's next output; the last one has a finish reason."""
        if self._matcher is not None:
            text, used = self._match(output)
        else:
            text, used = self._decode(self._visible(output)), len(output.token_ids)
        finish, stop_reason = output.finish_reason, output.stop_reason
        if finish is not None and not self.stopped:
            text += self._flush()
        if self._matcher is not None and self._matcher.matched is not None:
            self.stopped = True
            finish, stop_reason = FinishReason.STOP, self._matcher.matched
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
        )

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
        return self._detokenizer.push(ids) if self._detokenizer is not None and ids else ""

    def _flush(self) -> str:
        """The text that was held back, at the end of a completion. A stop string may still complete in it."""
        tail = self._detokenizer.finish() if self._detokenizer is not None else ""
        if self._matcher is None:
            return tail
        return self._matcher.push(tail) + self._matcher.finish()

    def _logprobs(self, entries: tuple[TokenLogprobs, ...] | None, used: int) -> tuple[TokenLogprob, ...] | None:
        if entries is None or self._params.logprobs is None:
            return None
        return tuple(self._logprob(entry) for entry in entries[:used])

    def _prompt_logprobs(self, output: EngineOutput) -> tuple[TokenLogprob | None, ...] | None:
        if output.prompt_logprobs is None:
            return None
        return tuple(entry and self._logprob(entry) for entry in output.prompt_logprobs)

    def _logprob(self, entry: TokenLogprobs) -> TokenLogprob:
        top = tuple(self._named(token, logprob, i + 1) for i, (token, logprob) in enumerate(entry.top))
        return self._named(entry.token_id, entry.logprob, entry.rank, top)

    def _named(self, token: int, logprob: float, rank: int, top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
        raw = self._tokenizer.token_bytes(token)
        return TokenLogprob(token, raw.decode("utf-8", errors="replace"), raw, logprob, rank, top)
