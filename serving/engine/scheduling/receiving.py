"""Requests that wait for pages which another engine sends: put aside, and back into the queue with what has come."""

from __future__ import annotations

from serving.engine.cache.replicas import Replicas
from serving.engine.requests.moves import Landing
from serving.engine.requests.request import Request, RequestState
from serving.engine.scheduling.policy import WaitingQueue


class Receiving:
    """Moves requests between WAITING and RECEIVING.

    Attributes:
        count: requests that receive now. What they hold may be what others wait for.
    """

    def __init__(self, waiting: WaitingQueue, kv: Replicas) -> None:
        self.count = 0
        self._waiting = waiting
        self._kv = kv

    def begin(self, request: Request | None, tokens: int) -> Landing | None:
        """Makes room for the first `tokens` of a waiting request; None where there is none, or nothing to come."""
        if request is None or request.state is not RequestState.WAITING:
            return None
        landing = self._kv.expect(request, tokens)
        if landing is not None:
            self.hold(request)
        return landing

    def hold(self, request: Request | None) -> bool:
        """Has a waiting request wait for what is on its way to another one; whether it was one."""
        if request is None or request.state is not RequestState.WAITING:
            return False
        self._waiting.remove(request)
        request.move(RequestState.RECEIVING)
        self.count += 1
        return True

    def end(self, request: Request, tokens: int, step: int) -> None:
        """So many of the tokens are there: the request waits for its turn, and finds them like any other prefix."""
        self._kv.arrived(request, tokens, step)
        self.count -= 1
        request.move(RequestState.WAITING)
        self._waiting.push(request)

    def drop(self, request: Request, step: int) -> None:
        """The request ends while it receives."""
        self._kv.leave(request, step)
        self.count -= 1
