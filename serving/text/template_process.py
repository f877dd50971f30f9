"""Runs `template_worker.py` in processes of its own and keeps its deadline."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from serving.text import template_worker

START_TIMEOUT_S = 60.0  # 0.1 s when the machine is idle
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")


class TemplateTimeoutError(Exception):
    """The worker did not answer in time, and was killed."""


class TemplateCrashError(Exception):
    """The worker ended without an answer (out of memory in C code, killed from outside)."""


class _Worker:
    """One process, and the ids of the templates that it has compiled."""

    def __init__(self) -> None:
        self.loaded: set[str] = set()
        self._channel, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(template_worker.__file__).resolve()), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # Nothing secret for a template to find, and Ctrl-C in the terminal is not for this process.
                env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ},
                start_new_session=True,
            )
        self._channel.settimeout(START_TIMEOUT_S)
        if template_worker.receive(self._channel) is None:
            self.stop()
            raise TemplateCrashError(f"the template process ended at its start with code {self._process.returncode}")

    def ask(self, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """The worker's answer. After an exception the worker is of no more use."""
        end = time.monotonic() + deadline_s
        try:
            self._channel.settimeout(deadline_s)
            template_worker.send(self._channel, message)
            self._channel.settimeout(max(end - time.monotonic(), 0.001))
            reply = template_worker.receive(self._channel)
        except TimeoutError:
            raise TemplateTimeoutError from None
        except OSError:
            reply = None
        if reply is None:
            raise TemplateCrashError("the template process ended without an answer")
        return reply

    def stop(self) -> None:
        self._channel.close()
        self._process.kill()
        self._process.wait()


class TemplatePool:
    """Workers that are started when asked for and kept; at most `size` answer at a time. Thread-safe."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._reset()
        atexit.register(self.close)
        # A forked process must not talk to its parent's workers.
        os.register_at_fork(after_in_child=self._reset)

    def _reset(self) -> None:
        self._free = threading.Semaphore(self._size)
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []

    def load(self, template: str, source: str, deadline_s: float) -> dict[str, Any]:
        """Compiles a template in one worker, under the name `template`."""
        return self._with_worker(template, source, None, deadline_s)

    def render(self, template: str, source: str, message: dict[str, Any], deadline_s: float) -> dict[str, Any]:
        """Renders a template, compiling it first in a worker that does not have it."""
        return self._with_worker(template, source, message, deadline_s)

    def close(self) -> None:
        """Ends the idle workers. The pool stays usable."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.stop()

    def _with_worker(
        self, template: str, source: str, message: dict[str, Any] | None, deadline_s: float
    ) -> dict[str, Any]:
        with self._free:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or _Worker()
            healthy = False
            try:
                reply: dict[str, Any] = {}
                if message is None or template not in worker.loaded:
                    reply = worker.ask({"load": template, "source": source}, deadline_s)
                    if "error" not in reply:
                        worker.loaded.add(template)
                if message is not None and "error" not in reply:
                    reply = worker.ask(message, deadline_s)
                healthy = True
                return reply
            finally:
                if healthy:
                    with self._lock:
                        self._idle.append(worker)
                else:
                    with contextlib.suppress(OSError):
                        worker.stop()


POOL = TemplatePool(size=min(4, os.cpu_count() or 1))
