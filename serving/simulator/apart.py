"""Engines that compute prompts for the others of a cluster, on its virtual clock: the gateway's own rule says which prompts, real
schedulers compute them and receive what comes, and the way between them takes what a link takes.

Pages travel while their prompt is computed, as far as the link keeps up. Transfers do not take a link from each other.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterator, Sequence

from serving.engine.api.types import EngineOutput, EngineRequest
from serving.routing.apart import LEAST_TOKENS, Weighing
from serving.simulator.simulate import Simulation, params_of
from serving.simulator.trace import TraceRequest


@dataclasses.dataclass(frozen=True)
class Link:
    """How pages get from one engine to another.

    Attributes:
        token_s: seconds that the pages of a token take.
        lag_s: seconds from the end of a prompt until its last page can be there.
        piece: tokens of a prompt's last piece at most: its pages cannot travel before its end.
    """

    token_s: float = 1e-4
    lag_s: float = 0.02
    piece: int = 1024

    def seconds(self, tokens: int, computed_in: float) -> float:
        """From a prompt's end, computed within so many seconds, until its pages are there."""
        return self.lag_s + max(min(tokens, self.piece) * self.token_s, tokens * self.token_s - computed_in)


@dataclasses.dataclass(eq=False)
class Helper:
    """An engine that computes prompts; see routing.apart.Helping."""

    engine: Simulation
    queued: int = 0
    served: int = 0


@dataclasses.dataclass
class _OnItsWay:
    """A prompt that a helper computes.

    Attributes:
        number: of the engine that goes on with it.
        tokens: that it made room for.
        alone: it is the helper's only one: what it takes is what tokens take.
        done: when its helper was done with it; virtual seconds. None before.
    """

    helper: Helper
    number: int
    tokens: int
    suffix: int
    began: float
    alone: bool
    done: float | None = None


class Helpers:
    """The engines of a cluster that compute prompts.

    Args:
        engines: which they are.
        policy, least_tokens: as the gateway's.

    Attributes:
        decisions: as of the gateway's prompts; "no room": the engine that was to go on had no pages to receive into.
        computed_tokens: of prompts.
    """

    def __init__(
        self, engines: Sequence[Simulation], link: Link, policy: str = "auto", least_tokens: int = LEAST_TOKENS
    ) -> None:
        self.engines = engines
        self.decisions: Counter[str] = Counter()
        self._link = link
        self._weighing = Weighing(policy, least_tokens)
        self._helpers = [Helper(one) for one in engines]
        self._of_engine = {id(one.engine): i for i, one in enumerate(self._helpers)}
        self._prompts: dict[str, _OnItsWay] = {}
        self._busy: list[tuple[float, int]] = []  # (clock, helper) of those that have something to do
        self._coming: list[tuple[float, str]] = []  # (when all of it is there, request)
        for helper in self._helpers:
            helper.engine.on_end = self._on_end

    def help(
        self, index: int, request: TraceRequest, spec: EngineRequest, number: int, engine: Simulation, matched: int, running: int
    ) -> None:  # fmt: skip
        """A request was given to an engine of this number that has `matched` tokens of its prompt, and `running` others."""
        suffix = request.prompt_tokens - matched
        config = engine.scheduler.config
        helper, reason = self._weighing.choose(self._helpers, suffix, running, config.page_size)
        if helper is not None:
            landing = engine.scheduler.receive(spec.request_id, request.prompt_tokens - 1)
            if landing is None:
                helper, reason = None, "no room"
            else:
                self._prompts[spec.request_id] = _OnItsWay(
                    helper, number, landing.tokens, suffix, request.arrival, not helper.queued
                )
        self.decisions[reason] += 1
        if helper is None:
            return
        own = dataclasses.replace(spec, params=params_of(1))
        helper.queued += suffix
        helper.served += 1
        if not helper.engine.num_live:
            helper.engine.device.now = max(helper.engine.now, request.arrival)
            heapq.heappush(self._busy, (helper.engine.now, self._of_engine[id(helper.engine)]))
        helper.engine.submit(index, dataclasses.replace(request, output_tokens=1, output_id=None), own)

    def until(self, end: float) -> Iterator[tuple[float, int, str, int]]:
        """Computes up to a time. What comes before it, in order: (when, at which engine, which request, how many tokens)."""
        while self._busy and self._busy[0][0] < end:
            number = heapq.heappop(self._busy)[1]
            engine = self._helpers[number].engine
            engine.advance(end)
            engine.take_ended()
            if engine.num_live:
                heapq.heappush(self._busy, (engine.now, number))
        while self._coming and self._coming[0][0] < end:
            at, name = heapq.heappop(self._coming)
            prompt = self._prompts[name]
            yield at, prompt.number, name, prompt.tokens

    def begun(self, name: str, now: float) -> None:
        """A request's first token has come."""
        prompt = self._prompts.pop(name, None)
        if prompt is not None and prompt.done is not None:
            self._weighing.costs.learn("lag_s", max(0.0, now - prompt.done))

    def _on_end(self, output: EngineOutput) -> None:
        prompt = self._prompts[output.request_id]
        helper = prompt.helper
        prompt.done = now = helper.engine.now
        helper.queued -= prompt.suffix
        computed = prompt.tokens + 1 - output.num_cached_tokens
        if prompt.alone and computed >= LEAST_TOKENS:
            self._weighing.costs.learn("token_s", (now - prompt.began) / computed)
        seconds = self._link.seconds(computed, now - prompt.began)
        heapq.heappush(self._coming, (now + seconds, output.request_id))
