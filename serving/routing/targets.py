"""What a router knows of each engine that it may choose."""

from __future__ import annotations

import dataclasses

from serving.engine.api.types import EngineStats


@dataclasses.dataclass(slots=True, eq=False)
class Target:
    """One engine, as a router sees it.

    Attributes:
        name: its address; unique among a router's targets.
        live: requests that this router has there now, exact.
        foreign: requests of others there (other gateways, direct clients), when it last told.
        kv_usage: fraction of its pages in use by live requests, 0..1, when it last told.
        adapters: digests of the adapters it has; None where it does not say.
        routed: requests that it was given since the start.
    """

    name: str
    live: int = 0
    foreign: int = 0
    kv_usage: float = 0.0
    adapters: frozenset[str] | None = None
    routed: int = 0

    @property
    def load(self) -> int:
        """Requests that run or wait there, as far as is known."""
        return self.live + self.foreign

    def told(self, stats: EngineStats) -> None:
        """Takes in what the engine says of itself. Call it when that arrives: `live` is compared with it."""
        self.foreign = max(0, stats.num_running + stats.num_waiting - self.live)
        self.kv_usage = stats.kv_usage

    def has(self, adapter: str | None) -> bool:
        """Whether it can run a request with this adapter; without one, always."""
        return adapter is None or self.adapters is None or adapter in self.adapters
