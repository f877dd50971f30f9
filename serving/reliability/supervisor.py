"""python -m serving.launch --supervise: keeps a server running, by starting it again when it dies.

The supervisor imports neither JAX nor the server, so nothing that kills a server kills it. A restart finds the compiled
programs in the cache. It waits longer after each failure, gives up on a server that never becomes ready, and starts nothing
again that ended because it was asked to or because its flags are wrong.
"""

from __future__ import annotations

import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

from serving.reliability.notify import VARIABLE

RESTARTS = "SUPERVISED_RESTARTS"
"""In the server's environment: how often it was started again."""

FIRST_DELAY_S = 1.0
LONGEST_DELAY_S = 60.0
SETTLED_S = 60.0
"""A server that ran so long starts again with the first delay."""

MAX_FAILED_STARTS = 5
"""In a row, after it has been ready once. The very first start is not tried again: what it says is about the flags."""

WRONG_FLAGS = 2


class Supervisor:
    """Runs one command until it ends as asked, or cannot be started.

    Args:
        command: of the server.
        say: told each event as one line.
    """

    def __init__(
        self,
        command: Sequence[str],
        say: Callable[[str], None] = lambda line: print(f"[supervisor] {line}", file=sys.stderr, flush=True),
        first_delay_s: float = FIRST_DELAY_S,
        settled_s: float = SETTLED_S,
    ) -> None:
        self._command = list(command)
        self._say = say
        self._first_delay = first_delay_s
        self._settled = settled_s
        self._child: subprocess.Popen[bytes] | None = None
        self._asked_to_stop = False
        self.restarts = 0

    def run(self) -> int:
        """Returns the exit status: the server's last one."""
        with tempfile.TemporaryDirectory(prefix="jaxserve-") as folder:
            path = pathlib.Path(folder) / "notify"
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
                told.bind(str(path))
                told.setblocking(False)
                old = {n: signal.signal(n, self._on_signal) for n in (signal.SIGTERM, signal.SIGINT)}
                try:
                    return self._run(told, {**os.environ, VARIABLE: str(path)})
                finally:
                    for number, handler in old.items():
                        signal.signal(number, handler)

    def _run(self, told: socket.socket, environment: dict[str, str]) -> int:
        delay, failed_starts, ever_ready = self._first_delay, 0, False
        while True:
            began = time.monotonic()
            # A session of its own: Ctrl-C on the terminal reaches the server once, through us, and not twice.
            self._child = subprocess.Popen(
                self._command,
                env={**environment, RESTARTS: str(self.restarts)},
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one thread
            )
            if self._asked_to_stop:
                self._child.send_signal(signal.SIGTERM)
            status = self._child.wait()
            ready = _was_ready(told)
            ever_ready |= ready
            if self._asked_to_stop or status in (0, WRONG_FLAGS):
                return status if status >= 0 else 128 - status
            how = f"ended with status {status}" if status >= 0 else f"was killed by {signal.Signals(-status).name}"
            failed_starts = 0 if ready else failed_starts + 1
            if not ever_ready or failed_starts >= MAX_FAILED_STARTS:
                self._say(f"the server {how} before it was ready; giving up")
                return status if status >= 0 else 128 - status
            if ready and time.monotonic() - began > self._settled:
                delay = self._first_delay
            self._say(f"the server {how} after {time.monotonic() - began:.1f} s; starting it again in {delay:g} s")
            self._wait(delay)
            if self._asked_to_stop:
                return status if status >= 0 else 128 - status
            self.restarts += 1
            delay = min(2 * delay, LONGEST_DELAY_S)

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._asked_to_stop and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _on_signal(self, number: int, frame: object) -> None:
        self._asked_to_stop = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)


def _was_ready(told: socket.socket) -> bool:
    """Reads what has been told since the last time."""
    ready = False
    while True:
        try:
            ready |= b"READY=1" in told.recv(4096)
        except BlockingIOError:
            return ready


def _die_with_parent() -> None:
    """In the child, before it becomes the server: on Linux it is told to stop when the supervisor is killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
