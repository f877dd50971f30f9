"""The engine's start beside the event loop that already answers health checks."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any


def start_in_thread(
    start: Callable[..., Any], say: Callable[[str], None], on_loss: Callable[[str], None]
) -> asyncio.Future[Any]:
    """Starts the engine; the future becomes what `start` gives. A daemon thread: a signal during start-up ends the process at once.

    Args:
        start: `serving.boot.startup.start` of a configuration, or what does the same for several models.
        say, on_loss: its arguments; called on this event loop.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            result = start(
                say=lambda line: loop.call_soon_threadsafe(say, line) and None,
                on_loss=lambda reason: loop.call_soon_threadsafe(on_loss, reason) and None,
            )
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, daemon=True, name="jaxserve-start").start()
    return future


def import_front_ends(http: bool) -> None:
    """Imports of a second or so, while XLA works and Python is idle."""
    import serving.metrics
    import serving.service

    if http:
        import serving.frontends.app  # noqa: F401
