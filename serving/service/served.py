"""What front ends serve: one model, which is a `TextService`, or several under their names, which are a fleet (`serving.fleet`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from serving.engine.api.types import EngineStats

if TYPE_CHECKING:
    from serving.service.requests.limits import Limits
    from serving.service.service import TextService


class Served(Protocol):
    """The models of a server, and what concerns all of them together. What concerns one model is its service's: `of` a request's
    model, before anything else is asked."""

    limits: Limits
    created: int
    started: float
    draining_listeners: list[Callable[[bool], None]]

    @property
    def first(self) -> TextService:
        """The one that requests get which name no model."""
        ...

    def of(self, model: str | None, tenant: str | None = None) -> TextService:
        """The service that knows a model, by one of its names or an adapter's.

        Args:
            tenant: whom a gateway asks for.
        Raises:
            RequestError: NOT_FOUND: there is no such model, or none for the caller of the running task.
        """
        ...

    def visible(self) -> Sequence[TextService]:
        """Those that the caller of the running task may use, the first one first."""
        ...

    @property
    def services(self) -> Sequence[TextService]:
        """All of them, whoever asks."""
        ...

    @property
    def num_live(self) -> int:
        """Requests that are being generated."""
        ...

    @property
    def draining(self) -> bool: ...

    def start_draining(self) -> None:
        """From now on new requests are refused with UNAVAILABLE; what runs goes on."""
        ...

    def stop_draining(self) -> None:
        """Takes requests again."""
        ...

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is live; False when some still are after `timeout_s` seconds."""
        ...

    def check_ready(self) -> None:
        """Raises UNAVAILABLE while no request is taken."""
        ...

    async def abort(self, request_id: str) -> bool:
        """Ends every live request of a name that the caller may end. False if there is none."""
        ...

    async def abort_all(self, within_s: float = 1.0) -> None:
        """Ends every live request with UNAVAILABLE."""
        ...

    async def rehearse(self) -> None:
        """Takes a text through the text side once."""
        ...


def stats_of(served: Served) -> EngineStats:
    """The load of all the models together: counts are sums, what no sum makes sense of is the first one's."""
    first, *others = (service.client.stats() for service in served.services)
    summed = {
        field.name: sum(getattr(one, field.name) for one in (first, *others))
        for field in dataclasses.fields(EngineStats)
        if isinstance(field.default, int | float) and field.name not in ("last_step_s", "host_step_s")
    }
    return dataclasses.replace(first, **summed) if others else first
