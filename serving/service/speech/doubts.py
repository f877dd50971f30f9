"""When a window's text is not believed: Whisper's authors' rules (arXiv:2212.04356, section 4.5). Text that repeats itself or that
the model thought unlikely is drawn again at higher temperatures; unlikely text where probably nobody speaks is silence."""

from __future__ import annotations

import dataclasses

from serving.service.speech.segments import compression_ratio


@dataclasses.dataclass(frozen=True)
class Attempt:
    """What the model said of a window once.

    Attributes:
        tokens: without the end's.
        temperature: they were drawn at.
        avg_logprob: the mean of their log probabilities, the end's included; None where nobody asked.
        prompt_logprob: of the prompt's last token, where asked for.
        no_speech: the probability that nobody speaks, where asked for.
    """

    tokens: tuple[int, ...]
    temperature: float
    avg_logprob: float | None
    prompt_logprob: float | None = None
    no_speech: float | None = None

    def with_no_speech(self, probability: float | None) -> Attempt:
        return dataclasses.replace(self, no_speech=probability)


@dataclasses.dataclass(frozen=True)
class Doubts:
    """Bounds; None for none.

    Attributes:
        compression: text that can be written so many times smaller repeats itself.
        logprob: text whose tokens have a lower mean log probability is unlikely.
        no_speech: unlikely text is silence where nobody speaks with more than this probability.
        temperatures: that doubtful text is drawn at again.
    """

    compression: float | None = 2.4
    logprob: float | None = -1.0
    no_speech: float | None = 0.6
    temperatures: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)

    @property
    def checks(self) -> bool:
        """Whether there is anything to look at."""
        return any(bound is not None for bound in (self.compression, self.logprob, self.no_speech))

    def unlikely(self, said: Attempt) -> bool:
        return self.logprob is not None and said.avg_logprob is not None and said.avg_logprob < self.logprob

    def of(self, said: Attempt, text: str) -> bool:
        """Whether an attempt is doubtful."""
        return self.unlikely(said) or (self.compression is not None and compression_ratio(text) > self.compression)

    def silent(self, said: Attempt) -> bool:
        """Whether it is silence."""
        return self.no_speech is not None and (said.no_speech or 0) > self.no_speech and self.unlikely(said)
