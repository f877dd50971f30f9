"""How long the phases of this process's start-up took: facts of the process, which starts one engine."""

from __future__ import annotations

_seconds: dict[str, float] = {}


def record(phase: str, seconds: float) -> None:
    """Notes how long a phase took; a later one of the same name replaces it."""
    _seconds[phase] = seconds


def recorded() -> dict[str, float]:
    """Phase -> seconds."""
    return dict(_seconds)
