"""Faults on purpose, for tests and drills: `--inject-fault KIND[@STEP][:ARGUMENT]`. Only the operator's flags make them; no
request can.

They are put around the runner and the process, so what is tested is the code that serves, unchanged.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from serving.reliability.supervisor import RESTARTS

log = logging.getLogger(__name__)

KINDS = {
    "step-error": "dispatching step STEP fails, ARGUMENT times (1)",
    "out-of-memory": "the device has no memory for step STEP, ARGUMENT times (1)",
    "poison": "every step fails that computes a prompt with token id ARGUMENT",
    "transfer-error": "reading step STEP's results fails",
    "slow-step": "reading step STEP's results takes ARGUMENT seconds longer (1)",
    "stall": "step STEP never ends",
    "kill": "the process is killed at step STEP",
    "stuck-loop": "the event loop is blocked from step STEP on, for ARGUMENT seconds (3600)",
    "clock-jump": "the wall clock jumps by ARGUMENT seconds (3600) at step STEP",
    "disk-full": "no file can grow beyond 4 KiB from the start on",
}
_SPEC = re.compile(r"([a-z-]+)(?:@(\d+))?(?::(-?\d+(?:\.\d+)?))?")


@dataclasses.dataclass(frozen=True)
class Fault:
    """One fault. `step` counts dispatches since start, from 1."""

    kind: str
    step: int = 1
    argument: float | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Raises ValueError, in a sentence, for what is no fault."""
        found = _SPEC.fullmatch(text)
        if found is None or found[1] not in KINDS:
            raise ValueError(
                f"inject_fault takes KIND[@STEP][:ARGUMENT] with KIND one of {', '.join(KINDS)}; got {text!r}."
            )
        return cls(found[1], int(found[2] or 1), float(found[3]) if found[3] else None)


class InjectedError(RuntimeError):
    """What an injected fault raises."""


_RAISED = {"step-error": "injected step error", "out-of-memory": "RESOURCE_EXHAUSTED: injected: out of memory"}


def wanted(texts: Sequence[str]) -> list[Fault]:
    """The faults of the flags. A server that was started again after one has none: what is drilled is that it serves on."""
    return [] if int(os.environ.get(RESTARTS, "0")) else [Fault.parse(text) for text in texts]


def strike_at_start(faults: Sequence[Fault]) -> None:
    """Those faults that do not wait for a step."""
    if any(fault.kind == "disk-full" for fault in faults):
        _tell(Fault("disk-full"), 0)
        _fill_disk()


def _tell(fault: Fault, number: int) -> None:
    log.warning("fault on purpose: %s at step %d", fault.kind, number)


class FaultyRunner:
    """A runner of steps, or of an encoder's batches, with faults. Everything else is the runner's. What is said of a step is of
    an encoder's batch.

    Args:
        block_event_loop: blocks the server's event loop for some seconds.
    """

    def __init__(
        self, runner: Any, faults: Sequence[Fault], block_event_loop: Callable[[float], None] | None = None
    ) -> None:
        self._runner = runner
        self._faults = list(faults)
        self._block = block_event_loop
        self._dispatched = 0
        self._numbers: dict[int, int] = {}  # id of a step in flight -> its number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runner, name)

    def dispatch_forward(self, plan: Any, slots: Any) -> Any:
        number = self._begin([r.spec.prompt_token_ids for r in plan.requests])
        step = self._runner.dispatch_forward(plan, slots)
        self._numbers[id(step)] = number
        return step

    def collect(self, step: Any) -> Any:
        self._read(self._numbers.pop(id(step), 0))
        return self._runner.collect(step)

    def run(self, texts: Sequence[Any]) -> Any:
        """An encoder's batch, dispatched and read."""
        number = self._begin([text.token_ids for text in texts])
        results = self._runner.run(texts)
        self._read(number)
        return results

    def _begin(self, prompts: Iterable[Sequence[int]]) -> int:
        """What strikes when a step is dispatched. Returns its number."""
        self._dispatched += 1
        number = self._dispatched
        for fault in self._faults:
            times = int(fault.argument or 1)
            if fault.kind in _RAISED and fault.step <= number < fault.step + times:
                raise InjectedError(_RAISED[fault.kind])
            if fault.kind == "poison" and any(int(fault.argument or 0) in prompt for prompt in prompts):
                raise InjectedError("injected: poisoned request")
            if fault.step == number:
                self._strike(fault)
        return number

    def _read(self, number: int) -> None:
        """What strikes when a step's results are read."""
        for fault in self._faults:
            if fault.step != number:
                continue
            if fault.kind in ("transfer-error", "slow-step", "stall"):
                _tell(fault, number)
            if fault.kind == "transfer-error":
                raise InjectedError("injected transfer error")
            if fault.kind == "slow-step":
                time.sleep(1.0 if fault.argument is None else fault.argument)
            if fault.kind == "stall":
                threading.Event().wait()

    def _strike(self, fault: Fault) -> None:
        if fault.kind in ("kill", "clock-jump", "stuck-loop"):
            _tell(fault, fault.step)
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "clock-jump":
            _jump_clock(3600.0 if fault.argument is None else fault.argument)
        elif fault.kind == "stuck-loop" and self._block is not None:
            self._block(3600.0 if fault.argument is None else fault.argument)


def _jump_clock(seconds: float) -> None:
    """What setting the machine's clock does to this process: time.time jumps, time.monotonic does not."""
    real = time.time
    time.time = lambda: real() + seconds


def _fill_disk() -> None:
    """Every write beyond 4 KiB of any file fails, as on a full disk (with EFBIG instead of ENOSPC)."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
