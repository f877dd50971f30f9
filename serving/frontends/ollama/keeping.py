"""`keep_alive`: how long a model stays behind its last request, where several share the server."""

from __future__ import annotations

import re

from serving.access.keys import Role, caller_of_task
from serving.engine.api.client import Residence
from serving.errors import invalid
from serving.frontends.ollama.protocol import KeepAlive
from serving.service import TextService

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(ns|us|µs|ms|s|m|h)")
_WHOLE = re.compile(rf"-?(?:{_PART.pattern})+")


def seconds_of(value: KeepAlive | None) -> float | None:
    """Seconds, of a number or a duration as Go writes them ("5m", "1h30m"); below 0: for ever. None where nothing was said.

    Raises:
        RequestError: INVALID_ARGUMENT: it is neither.
    """
    if value is None or isinstance(value, int | float):
        return None if value is None else float(value)
    try:
        return float(value)
    except ValueError:
        pass
    if not _WHOLE.fullmatch(value):
        raise invalid(f"keep_alive must be seconds or a duration such as 5m, got {value!r}.", "keep_alive")
    total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(value))
    return -total if value.startswith("-") else total


def keep(service: TextService, value: KeepAlive | None) -> None:
    """Does what `keep_alive` says, where the model may go at all and the caller may decide that; what it says is checked in any
    case."""
    seconds, residence = seconds_of(value), movable(service)
    if seconds is not None and residence is not None:
        residence.keep(None if seconds < 0 else seconds)


def movable(service: TextService) -> Residence | None:
    """The place of a model that the caller may have put to sleep: without keys everybody may, with keys an admin. None where it
    stays."""
    caller = caller_of_task.get()
    return service.client.residence if caller is None or caller.role.allows(Role.ADMIN) else None
