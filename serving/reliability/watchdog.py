"""Notices that nothing moves any more: a device that never answers, a deadlock, an event loop that is stuck.

It runs in a thread of its own and waits for nobody. What it finds it tells once; should that not end the process within
`GRACE_S`, it ends it itself, because a server that neither serves nor dies is the one failure that nothing restarts.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

GRACE_S = 10.0


class StalledError(RuntimeError):
    """The engine or the event loop has not moved for longer than the watchdog waits."""


class Watchdog:
    """Watches one engine loop and one event loop.

    Args:
        busy_since: time.monotonic() seconds at which the engine's current round began, or None when it has nothing to do.
        timeout_s: how long a round may take.
        on_stall: told what stalled, from the watchdog's thread.
        give_up: ends the process; called `grace_s` after `on_stall` unless `stop` was called.
        event_loop: also watched, by asking it to answer; None: not.
    """

    def __init__(
        self,
        busy_since: Callable[[], float | None],
        timeout_s: float,
        on_stall: Callable[[StalledError], None],
        give_up: Callable[[], None],
        event_loop: asyncio.AbstractEventLoop | None = None,
        grace_s: float = GRACE_S,
    ) -> None:
        if timeout_s <= 0:
            raise ValueError(f"watchdog_timeout must be more than 0 seconds, got {timeout_s:g}.")
        self._busy_since = busy_since
        self._timeout = timeout_s
        self._on_stall = on_stall
        self._give_up = give_up
        self._event_loop = event_loop
        self._grace = grace_s
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxserve-watchdog", daemon=True)

    def start(self) -> None:
        self._answered = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Looks no more, and gives nothing up."""
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(min(1.0, self._timeout / 8)):
            error = self._stalled(time.monotonic())
            if error is None:
                self._ask()
                continue
            log.critical("%s", error)
            try:
                self._on_stall(error)
            except Exception:
                log.exception("telling of the stall failed")
            if not self._stopped.wait(self._grace):
                self._give_up()
            return

    def _stalled(self, now: float) -> StalledError | None:
        since = self._busy_since()
        if since is not None and now - since > self._timeout:
            return StalledError(f"the engine has been in one step for {now - since:.1f} s (limit {self._timeout:g} s).")
        if self._event_loop is not None and now - self._answered > self._timeout:
            return StalledError(f"the event loop has not answered for {now - self._answered:.1f} s.")
        return None

    def _ask(self) -> None:
        if self._event_loop is not None:
            try:
                self._event_loop.call_soon_threadsafe(self._answer)
            except RuntimeError:  # closed: the server is at its end
                self._stopped.set()

    def _answer(self) -> None:
        self._answered = time.monotonic()
