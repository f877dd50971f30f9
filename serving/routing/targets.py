"""What a router knows of each engine that it may choose."""

from __future__ import annotations

from operator import attrgetter

from serving.engine.api.types import EngineStats


class Target:
    """One engine, as a router sees it.

    Attributes:
        name: its address; unique among a router's targets.
        bit: the router's number of it, as a bit: sets of targets are sums of these.
        load: requests that run or wait there, as far as is known: a thousand targets are compared by it for each request, so it is
            kept and not added up then.
        kv_usage: fraction of its pages in use by live requests, 0..1, when it last told.
        adapters: digests of the adapters it has; None where it does not say.
        reads: what it reads besides text, as in `EngineInfo.modalities`; None where it does not say.
        routed: requests that it was given since the start.
    """

    __slots__ = ("_foreign", "_live", "adapters", "bit", "kv_usage", "load", "name", "reads", "routed")

    def __init__(self, name: str, bit: int = 1) -> None:
        self.name = name
        self.bit = bit
        self._live = self._foreign = self.load = self.routed = 0
        self.kv_usage = 0.0
        self.adapters: frozenset[str] | None = None
        self.reads: frozenset[str] | None = None

    @property
    def live(self) -> int:
        """Requests that this router has there now, exact."""
        return self._live

    @live.setter
    def live(self, count: int) -> None:
        self._live = count
        self.load = count + self._foreign

    @property
    def foreign(self) -> int:
        """Requests of others there (other gateways, direct clients), when it last told."""
        return self._foreign

    def told(self, stats: EngineStats) -> None:
        """Takes in what the engine says of itself. Call it when that arrives: `live` is compared with it."""
        self._foreign = max(0, stats.num_running + stats.num_waiting - self._live)
        self.load = self._live + self._foreign
        self.kv_usage = stats.kv_usage

    def can(self, adapter: str | None, senses: frozenset[str]) -> bool:
        """Whether it can run a request with this adapter, for which a model must read that; without either, always."""
        has = adapter is None or self.adapters is None or adapter in self.adapters
        return has and (self.reads is None or senses <= self.reads)


load_of = attrgetter("load")
"""For `min`, `map` and `sort`: what a property costs a thousand times."""
