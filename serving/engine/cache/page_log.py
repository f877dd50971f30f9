"""The log of what is indexed and what no more. The engine thread puts events in, which costs it an append; a thread of the log's
own numbers them and tells whoever follows."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
import uuid
from collections import deque

from serving.engine.api.page_events import (
    Listener,
    PageBatch,
    PageEvent,
    PageEvents,
    PagesCleared,
    PagesRemoved,
    PagesStored,
)

log = logging.getLogger(__name__)

GATHER_S = 0.005
"""How long events gather before they are told: those of one step go together."""


class PageLog(PageEvents):
    """Numbered batches of page events, the last of them kept, and what all of them come to.

    Args:
        buffer_steps: batches that are kept for those who missed some.
    """

    def __init__(self, buffer_steps: int = 10_000) -> None:
        self.log_id = uuid.uuid4().hex
        self._new: deque[PageEvent] = deque()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._kept: deque[PageBatch] = deque(maxlen=buffer_steps)
        self._there: dict[tuple[int, bytes], PagesStored] = {}  # (replica, hash) -> that page alone
        self._listeners: list[Listener] = []
        self._next = 0
        self._stopped = False
        self._thread: threading.Thread | None = None

    def add(self, event: PageEvent) -> None:
        """Called by the engine thread."""
        self._new.append(event)
        self._wake.set()

    def start(self) -> None:
        """Begins to tell."""
        self._thread = threading.Thread(target=self._run, name="jaxserve-page-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tells what there is, and ends."""
        self._stopped = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(5.0)

    def follow(self, listener: Listener, after: int | None = None) -> None:
        """See PageEvents."""
        with self._lock:
            first = self._kept[0].sequence if self._kept else self._next
            if after is not None and first - 1 <= after < self._next:
                for batch in self._kept:
                    if batch.sequence > after:
                        listener(batch)
            else:
                listener(PageBatch(self._next - 1, time.time(), self._everything(), snapshot=True))
            self._listeners.append(listener)

    def leave(self, listener: Listener) -> None:
        """See PageEvents."""
        with self._lock:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def since(self, sequence: int) -> list[PageBatch]:
        """See PageEvents."""
        with self._lock:
            return [batch for batch in self._kept if batch.sequence >= sequence]

    def tell(self) -> None:
        """Tells what has gathered. Called by the log's thread; by tests, where there is none."""
        events: list[PageEvent] = []
        while self._new:
            events.append(self._new.popleft())
        if not events:
            return
        with self._lock:
            batch = PageBatch(self._next, time.time(), tuple(events))
            self._next += 1
            for event in events:
                self._apply(event)
            self._kept.append(batch)
            for listener in self._listeners:
                try:
                    listener(batch)
                except Exception:
                    log.exception("whoever follows the page events failed")

    def _run(self) -> None:
        while not self._stopped:
            self._wake.wait()
            time.sleep(GATHER_S)
            self._wake.clear()
            self.tell()
        self.tell()

    def _apply(self, event: PageEvent) -> None:
        if isinstance(event, PagesStored):
            width, parent = 4 * event.page_size, event.parent
            for i, one in enumerate(event.hashes):
                tokens = event.tokens[i * width : (i + 1) * width]
                self._there[event.replica, one] = dataclasses.replace(
                    event, hashes=(one,), parent=parent, tokens=tokens
                )
                parent = one
        elif isinstance(event, PagesRemoved):
            for one in event.hashes:
                self._there.pop((event.replica, one), None)
        else:
            for key in [key for key in self._there if key[0] == event.replica]:
                del self._there[key]

    def _everything(self) -> tuple[PageEvent, ...]:
        """All that is there, parents before their children."""
        found: dict[tuple[int, bytes], PageEvent] = {}
        for key, page in self._there.items():
            way = [(key, page)]
            while page.parent is not None and (page.replica, page.parent) not in found:
                above = self._there.get((page.replica, page.parent))
                if above is None:
                    break
                way.append(((page.replica, page.parent), above))
                page = above
            for one, event in reversed(way):
                found.setdefault(one, event)
        replicas = sorted({replica for replica, _ in self._there} | {0})
        return (*(PagesCleared(replica) for replica in replicas), *found.values())
