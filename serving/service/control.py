"""What admins do to a running server, the same over gRPC and HTTP: pause, sleep, swap weights, drain.

Callers have been checked: `Access.check_control`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from serving.errors import ErrorKind, RequestError, invalid

if TYPE_CHECKING:
    from serving.service.served import Served
    from serving.service.service import TextService

log = logging.getLogger(__name__)
MAX_SOURCE_CHARS = 4096


@dataclasses.dataclass(frozen=True)
class State:
    """Where a server is between serving and sleeping."""

    paused: bool
    asleep: bool
    draining: bool
    num_live: int


class ServerControl:
    """Acts on one service and the engine behind it. Every method returns the state that it led to.

    Args:
        service: of one model.
        served: what drains, where that is more than the one service.

    Raises (every method):
        RequestError: UNIMPLEMENTED where the engine is elsewhere (a gateway: control its targets), FAILED_PRECONDITION for
            what does not fit the state, INVALID_ARGUMENT.
    """

    def __init__(self, service: TextService, served: Served | None = None) -> None:
        self._service = service
        self._served = served or service

    def state(self) -> State:
        lifecycle = self._service.client.lifecycle
        return State(
            paused=bool(lifecycle and lifecycle.paused),
            asleep=bool(lifecycle and lifecycle.asleep),
            draining=self._served.draining,
            num_live=self._served.num_live,
        )

    async def pause(self) -> State:
        """No further steps: streams hold, new requests wait."""
        return await self._do("pause")

    async def resume(self) -> State:
        """Goes on after `pause` or `drain`."""
        self._served.stop_draining()
        return await self._do("resume") if self._service.client.lifecycle is not None else self.state()

    async def sleep(self, level: int = 1) -> State:
        """Gives the devices' memory back; level 2 the weights' host copy too."""
        if (residence := self._service.client.residence) is not None:
            await residence.sleep()
            return self.state()
        return await self._do("sleep", level)

    async def wake(self) -> State:
        """Takes the memory again and goes on."""
        if (residence := self._service.client.residence) is not None:
            await residence.load()
            return self.state()
        return await self._do("wake")

    async def reset_prefix_cache(self) -> State:
        """Forgets every cached prefix."""
        return await self._do("reset_prefix_cache")

    async def update_weights(self, source: str) -> State:
        """Swaps to another checkpoint of the same shape while streams run."""
        if not isinstance(source, str) or not source or len(source) > MAX_SOURCE_CHARS:
            raise invalid("source must name a checkpoint, as --model does.", "source")
        state = await self._do("update_weights", source)
        self._service.info = self._service.client.info()  # another checkpoint may name its labels and prompts otherwise
        return state

    async def drain(self, timeout_s: float | None = None) -> State:
        """Takes no more requests from now on (readiness says so) and waits for those that run, `timeout_s` seconds at
        most, or not at all."""
        self._service.limits.check_timeout("timeout", timeout_s)
        self._served.start_draining()
        if timeout_s is not None:
            await self._served.wait_idle(timeout_s)
        return self.state()

    async def _do(self, name: str, *args: Any) -> State:
        lifecycle = self._service.client.lifecycle
        if lifecycle is None and self._service.client.residence is not None:
            raise RequestError(
                ErrorKind.FAILED_PRECONDITION,
                f"The model {self._service.model_id!r} is not loaded: POST /models/load first.",
            )
        if lifecycle is None:
            raise RequestError(ErrorKind.UNIMPLEMENTED, "No engine runs in this process: ask the server that has it.")
        log.warning("control: %s", name)
        await asyncio.to_thread(getattr(lifecycle, name), *args)
        return self.state()
