"""What every engine does when it dies, of its own failure or because a watchdog gives it up."""

from __future__ import annotations

import threading
from typing import Any

from serving.errors import DIED, ErrorKind, RequestError


class Mortal:
    """An engine that may die once.

    Attributes:
        client: the in-process client, set by the engine: has `draining` and `fail_all`.
        failure: what killed the engine, or None.
        died: set after every request was told.
    """

    client: Any

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.died = threading.Event()

    def declare_dead(self, error: BaseException) -> None:
        """Ends every request with an error, and takes no more. What the engine's own thread does when it fails, and a
        watchdog for one that is stuck."""
        if self.failure is not None:
            return
        self.failure = error
        self.client.draining = True
        self.client.fail_all(RequestError(ErrorKind.INTERNAL, "the engine died; the server is going down.", code=DIED))
        self.died.set()
