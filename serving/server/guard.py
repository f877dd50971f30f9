"""What stands beside a running engine: the watchdog, faults on purpose, and the report of a crash."""

from __future__ import annotations

import argparse
import asyncio
import os
import pathlib
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.access.flags import SECRET_FLAGS
from serving.reliability import crash_report
from serving.reliability.faults import FaultyRunner, wanted
from serving.reliability.watchdog import StalledError, Watchdog

if TYPE_CHECKING:
    from serving.boot.start import AnyEngine
    from serving.fleet.start import FleetEngine

EXIT_STALLED = 75
"""Nothing moved any more, and the process had to be ended from its watchdog's thread."""


class Guard:
    """Watches one engine.

    Args:
        args: the server's flags.
        say: told where a report lies.
    """

    def __init__(self, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._args = args
        self._say = say
        self._reported = False

    def watch(self, engine: AnyEngine) -> None:
        """Puts the watchdog beside the engine, and the faults that were asked for into it. On the server's event loop."""
        loop = asyncio.get_running_loop()
        if faults := wanted(self._args.inject_fault):

            def block(seconds: float) -> None:
                loop.call_soon_threadsafe(time.sleep, seconds)

            engine.wrap_runner(lambda runner: FaultyRunner(runner, faults, block))
        if not self._args.watchdog_timeout:
            return

        known = weakref.ref(engine)  # one of several models may be unloaded: its watchdog ends with it

        def busy_since() -> float | None:
            alive = known()
            if alive is None:
                watchdog.stop()
            return None if alive is None else alive.busy_since

        def on_stall(error: StalledError) -> None:
            alive = known()
            if alive is not None and alive.failure is None:
                alive.declare_dead(error)
                self.report(alive, error)

        give_up = lambda: os._exit(EXIT_STALLED)  # noqa: E731
        watchdog = Watchdog(busy_since, self._args.watchdog_timeout, on_stall, give_up, loop)
        watchdog.start()

    def report(self, engine: AnyEngine | FleetEngine, error: BaseException) -> None:
        """Writes the crash report, once."""
        if self._reported:
            return
        self._reported = True
        where = pathlib.Path(self._args.crash_dir) if self._args.crash_dir else crash_report.folder()
        flags = {name: value for name, value in vars(self._args).items() if name not in SECRET_FLAGS}
        path = crash_report.write(where, error, flags=flags, stats=engine.client.stats(), steps=list(engine.recent))
        if path is not None:
            self._say(f"crash report: {path}")
