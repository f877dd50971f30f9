"""Engines that compute prompts for others: whether one is asked for a request, which one, and what becomes of it.

Where that pays, serving/routing/apart.py says. Whatever goes wrong, the engine that decodes computes what did not come.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

from serving.engine.api.adapters import AdapterClient
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, TransferParams
from serving.errors import RequestError
from serving.routing.apart import LEAST_TOKENS, Costs, Weighing
from serving.routing.targets import Target

log = logging.getLogger("serving.gateway")

WHY = ("apart", "short", "alone", "busy", "unfit", "none", "peer")
"""The decisions."""
GIVES, TAKES = ("prefill", "both"), ("decode", "both")


class PrefillEngine(Protocol):
    """What is asked of an engine that computes prompts."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]: ...

    async def release(self, ticket: str) -> None: ...

    def info(self) -> EngineInfo: ...

    @property
    def healthy(self) -> bool: ...

    @property
    def adapters(self) -> AdapterClient | None: ...


@dataclasses.dataclass(eq=False)
class Helper:
    """An engine that computes prompts.

    Attributes:
        queued: prompt tokens that it was given by us and has not computed.
        served: prompts.
    """

    name: str
    client: PrefillEngine
    queued: int = 0
    served: int = 0

    def can(self, request: EngineRequest) -> bool:
        """Whether it can compute a prompt: it has its adapter, and reads what is in it."""
        if request.media is not None and not request.media.senses <= set(self.client.info().modalities):
            return False
        if request.adapter is None:
            return True
        known = self.client.adapters
        return known is not None and any(one.digest == request.adapter for one in known.infos())


def place_of(name: str) -> tuple[str, int]:
    """Host and port of a target's gRPC."""
    host, _, port = name.rpartition(":")
    return host.strip("[]"), int(port)


@dataclasses.dataclass(eq=False)
class _Shared:
    """A prompt on its way, for all completions of it."""

    ticket: str
    helper: Helper
    task: asyncio.Task[None] | None = None
    users: int = 0
    done_at: float = 0.0


class Prefills:
    """The engines that compute prompts for a pool's.

    Args:
        policy: "auto" asks them where it pays, "always" wherever it can be done.
        least_tokens: a prompt must have so many to compute.

    Attributes:
        helpers: by name.
        decisions: what was decided, and why: apart, short, alone (nobody is held up), busy (they have more to do), unfit (it needs
            every position computed where it runs, or the engine takes no pages), none (no helper answers that has the
            adapter and reads what is in it), peer (another target has a longer part of it, to be fetched from there).
        failures: prompts that a helper refused or lost.
    """

    def __init__(self, policy: str = "auto", least_tokens: int = LEAST_TOKENS) -> None:
        self.helpers: dict[str, Helper] = {}
        self.decisions: Counter[str] = Counter()
        self.failures = 0
        self._weighing = Weighing(policy, least_tokens)
        self._shared: dict[tuple[object, ...], _Shared] = {}

    @property
    def costs(self) -> Costs:
        """What was measured."""
        return self._weighing.costs

    def add(self, name: str, client: PrefillEngine, model_id: str | None = None) -> None:
        """Takes one more.

        Raises:
            ValueError: it gives no pages, or serves another model than `model_id`.
        """
        info = client.info()
        if info.role not in GIVES:
            raise ValueError(
                f"it gives no pages to others (its role is {info.role or 'none'}): start it with --role prefill."
            )
        if model_id is not None and info.model_id != model_id:
            raise ValueError(f"it serves {info.model_id}, the targets {model_id}.")
        self.helpers[name] = Helper(name, client)

    def remove(self, name: str) -> None:
        """Asks it no more."""
        self.helpers.pop(name, None)

    def decide(self, request: EngineRequest, info: EngineInfo, matched: int, running: int) -> Helper | None:
        """Who computes the prompt; None: the engine that goes on with it. Counts the decision.

        Args:
            info: of the engine that goes on.
            matched: prompt tokens that it has, as far as is known.
            running: requests that it has besides.
        """
        helper, reason = self._choose(request, info, matched, running)
        self.decisions[reason] += 1
        return helper

    def _choose(
        self, request: EngineRequest, info: EngineInfo, matched: int, running: int
    ) -> tuple[Helper | None, str]:
        suffix = len(request.prompt_token_ids) - matched
        healthy = [one for one in self.helpers.values() if one.client.healthy and one.can(request)]
        if not healthy:
            return None, "none"
        if request.pooling or request.params.prompt_logprobs is not None or info.role not in TAKES or request.transfer:
            return None, "unfit"
        return self._weighing.choose(healthy, suffix, running, info.page_size)

    @contextlib.asynccontextmanager
    async def helped(
        self, request: EngineRequest, target: str, info: EngineInfo, matched: int, running: int
    ) -> AsyncIterator[tuple[EngineRequest, Note]]:
        """The request as the engine that goes on with it is to get it, while a helper computes its prompt; and where the caller
        says that its first token has come."""
        images = b"" if request.media is None else request.media.identity
        key = (target, request.prompt_token_ids, images, request.adapter, request.cache_salt)
        shared = self._shared.get(key)
        joins = shared is not None
        if shared is None:
            helper = self.decide(request, info, matched, running)
            if helper is None:
                yield request, Note(None, self.costs)
                return
            shared = self._shared[key] = _Shared(secrets.token_hex(16), helper)
            shared.task = asyncio.create_task(self._compute(shared, request, matched))
        shared.users += 1
        host, port = place_of(shared.helper.name)
        told = TransferParams(remote_prefill=True, host=host, port=port, ticket=shared.ticket)
        try:
            yield dataclasses.replace(request, transfer=told), Note(shared, self.costs, joins)
        finally:
            shared.users -= 1
            if not shared.users:
                if self._shared.get(key) is shared:
                    del self._shared[key]
                if shared.task is not None:
                    shared.task.cancel()

    def from_holder(
        self, request: EngineRequest, info: EngineInfo, matched: int, others: EngineInfo, holder: Target, tokens: int
    ) -> EngineRequest:
        """The request, told to fetch a part of its prompt from an engine that has it: what that engine of the same kind computed
        before. The one that runs it decides whether fetching is cheaper.

        Args:
            info: of the engine that runs it; `others`: of the one that has `tokens` of its prompt.
        """
        able = others.role in GIVES and info.role in TAKES and request.transfer is None and ":" in holder.name
        every_position = request.pooling or request.params.prompt_logprobs is not None
        if not able or every_position or tokens - matched < self._weighing.least_tokens:
            return request
        host, port = place_of(holder.name)
        self.decisions["peer"] += 1
        return dataclasses.replace(request, transfer=TransferParams(remote_prefill=True, host=host, port=port))

    async def _compute(self, shared: _Shared, request: EngineRequest, matched: int) -> None:
        """Has a helper compute the prompt, and learns what that took."""
        helper, tokens = shared.helper, len(request.prompt_token_ids) - matched
        own = dataclasses.replace(
            request,
            request_id=f"{request.request_id}~prefill",
            params=SamplingParams(temperature=0.0, max_tokens=1),
            constraint=None,
            bad_words_token_ids=(),
            transfer=TransferParams(remote_decode=True, ticket=shared.ticket),
        )
        alone, began = not helper.queued, time.monotonic()
        helper.queued += tokens
        helper.served += 1
        try:
            async with contextlib.aclosing(helper.client.generate(own)) as outputs:
                cached = 0
                async for output in outputs:
                    cached = max(cached, output.num_cached_tokens)
            shared.done_at = time.monotonic()
            computed = len(request.prompt_token_ids) - cached
            if alone and computed >= LEAST_TOKENS:
                self.costs.learn("token_s", (shared.done_at - began) / computed)
        except RequestError as error:
            self.failures += 1
            log.warning(
                "the engine at %s did not compute a prompt (%s); it is computed where it runs", helper.name, error
            )
            with contextlib.suppress(RequestError):
                await helper.client.release(shared.ticket)  # whoever waits for its pages need not any more
        finally:
            helper.queued -= tokens


@dataclasses.dataclass
class Note:
    """Where the pool says what it sees of a request."""

    _shared: _Shared | None
    _costs: Costs
    _joins: bool = False  # it came to a prompt that was on its way, or done, already: it shows no lag

    @property
    def helper(self) -> str | None:
        """Who computes its prompt."""
        return None if self._shared is None else self._shared.helper.name

    def begun(self) -> None:
        """Its first token has come."""
        if self._shared is not None and self._shared.done_at and not self._joins:
            self._costs.learn("lag_s", time.monotonic() - self._shared.done_at)
