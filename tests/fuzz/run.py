"""Runs targets for a number of cases and watches over each: what it may raise, how long it may take, what it may keep.

A target is `make(folder) -> case(rng)`: `case` reads one random input, and returns the texts that whoever sent it would see.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import pathlib
import random
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable

CASE_LIMIT_S = 60.0
"""A case that takes longer has hung, on a slow machine too. (Grammars may take their own limit, which the targets set to 2 s.)"""

INTERNAL = re.compile(
    r"Traceback \(most|File \"|site-packages|0x[0-9a-f]{6,}|/\w+\.py\b|\.py(?:\", line |:)\d|"
    r"/(?:root|home|usr|tmp|work|opt|var|proc)/\w|\bat 0x|src/[\w/]+\.rs"
)
"""What no reply may hold: stacks, addresses, and paths that are not the client's own."""

Case = Callable[[random.Random], Iterable[str]]
Make = Callable[[pathlib.Path], Case]


@dataclasses.dataclass
class Result:
    """What a run came to. `failures` has (seed of the case, what was wrong)."""

    target: str
    cases: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    grown_mb: float = 0.0
    failures: list[tuple[int, str]] = dataclasses.field(default_factory=list)


class HangError(BaseException):
    """No `Exception`, so that nothing in between takes it for an error of its own."""


def run(name: str, make: Make, cases: int, seed: int, seconds: float = float("inf")) -> Result:
    """Runs `cases` cases, or as many as fit into `seconds`. Case i has the seed f"{seed}:{i}", whatever ran before."""
    result = Result(name)
    limited = threading.current_thread() is threading.main_thread()
    faulthandler.enable()
    with tempfile.TemporaryDirectory(prefix="jaxserve-fuzz-") as folder:
        case = make(pathlib.Path(folder))
        began = time.monotonic()
        base, base_at = 0.0, max(50, cases // 5)
        old = signal.signal(signal.SIGALRM, _hang) if limited else None
        try:
            for i in range(cases):
                if time.monotonic() - began > seconds:
                    break
                if i == base_at:
                    base = _resident_mb()
                _one(case, seed, i, result, folder, limited)
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, old)
        result.seconds = time.monotonic() - began
        result.grown_mb = _resident_mb() - base if base else 0.0
    return result


def _one(case: Case, seed: int, i: int, result: Result, folder: str, limited: bool) -> None:
    rng = random.Random(f"{seed}:{i}")
    start = time.monotonic()
    if limited:
        signal.setitimer(signal.ITIMER_REAL, CASE_LIMIT_S)
    try:
        texts = list(case(rng))
        result.accepted += not texts
        for text in texts:
            leak = INTERNAL.search(text.replace(folder, ""))
            if leak:
                result.failures.append((i, f"internal text {leak[0]!r} in {text[:300]!r}"))
    except HangError:
        result.failures.append((i, f"took more than {CASE_LIMIT_S:g} s"))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        result.failures.append((i, f"{type(error).__name__}: {str(error)[:300]}"))
    result.cases += 1
    result.slowest_s = max(result.slowest_s, time.monotonic() - start)


def _hang(number: int, frame: object) -> None:
    raise HangError


def _resident_mb() -> float:
    gc.collect()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096 / 2**20
    except OSError:
        return 0.0
