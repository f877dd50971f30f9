"""How a process shows that it lives, and when another counts as lost."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

Message = TypeVar("Message")

HEARTBEAT_S = 1.0
"""A side that has said nothing for this long says that it is alive."""


class ProcessLostError(ConnectionError):
    """Another process of the engine is gone, stuck, or gives other tokens: the engine cannot go on. A sentence."""


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long silence is borne, in seconds. Together with closing down it stays below 15.

    Attributes:
        silence: without any message, from a process that ought to send one every HEARTBEAT_S. A process that dies closes its
            connection and is noticed at once; this is for machines that vanish and processes that are frozen.
        step: from a command that samples to its tokens, in any process. Starting is not bounded by it.
    """

    silence: float = 6.0
    step: float = 10.0


def outgoing(outbox: queue.SimpleQueue[Message | None], heartbeat: Message) -> Iterator[Message]:
    """What one side sends: what is put into the outbox, until a None, and `heartbeat` after HEARTBEAT_S of silence."""
    while True:
        try:
            message = outbox.get(timeout=HEARTBEAT_S)
        except queue.Empty:
            message = heartbeat
        if message is None:
            return
        yield message


class ProcessWatch:
    """Calls `look` twice a second on a thread of its own, until it returns a reason or the dog is stopped.

    Args:
        look: given time.monotonic(); a sentence when something is lost, else None.
        on_loss: given the sentence, once.
    """

    def __init__(self, look: Callable[[float], str | None], on_loss: Callable[[str], None]) -> None:
        self._look = look
        self._on_loss = on_loss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxserve-process-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        while not self._stopped.wait(HEARTBEAT_S / 2):
            reason = self._look(time.monotonic())
            if reason is not None:
                self._on_loss(reason)
                return
