"""Members around mock engines: what loads and sleeps is counted, and takes as long as a test says."""

from __future__ import annotations

import dataclasses
import threading
import time
import types
from typing import Any

from serving.boot.flags import ModelEntry
from serving.engine.api.client import Where
from serving.engine.api.config import EngineConfig
from serving.errors import ErrorKind, RequestError
from serving.fleet.client import MemberClient
from serving.fleet.fleet import Fleet
from serving.fleet.keeper import Keeper
from serving.fleet.member import Member
from serving.fleet.metrics import FleetMetrics
from serving.fleet.turns import Turns
from serving.metrics import MeteredClient
from tests.mock_engine import MockEngine, mock_service


class FakeEngine:
    """What a member uses of an engine."""

    def __init__(self, client: MockEngine) -> None:
        self.client = client
        self.recent = ()
        self.lifecycle = types.SimpleNamespace(paused=False, asleep=False)

    @property
    def failure(self):
        return self.client.failure


class FakeMember(Member):
    """A member of `size` bytes, whose engine answers with its name.

    Attributes:
        changes: what was done to it.
    """

    def __init__(self, name: str, size: int = 10, *, step_s: float = 0.0, load_s: float = 0.0, **entry: Any) -> None:
        engine = MockEngine(reply=f"I am {name}.", step_s=step_s)
        described: Any = type("Described", (), {"text": None})
        super().__init__(ModelEntry(name, EngineConfig(), **entry), described, engine.info(), size, Turns())
        self.info = dataclasses.replace(self.info, model_id=name)
        self.mock, self.load_s = engine, load_s
        self.changes: list[str] = []
        self.fails = False
        self.gate: threading.Event | None = None

    def load(self, say):
        self._do("load")
        self.mock.failure = None
        self.engine = FakeEngine(self.mock)  # type: ignore[assignment]

    def wake(self):
        self._do("wake")
        self.mock.refusal = None

    def sleep(self):
        self._resting = 0
        self._do("sleep")

    def drop(self):
        self.engine = None
        self.changes.append("drop")

    def _do(self, what):
        self.changes.append(what)
        if self.gate is not None:
            assert self.gate.wait(60)
        time.sleep(self.load_s)
        if self.fails:
            raise ValueError("the file is /secret/path, which is damaged.")


def fleet_of(
    *members: Member, memory: int = 20, wait_s: float = 60.0, turn_s: float = 0.05, tenants: Any = None
) -> Fleet:
    """A fleet over members, whose keeper runs on this event loop."""
    keeper = Keeper(members, memory, wait_s=wait_s, turn_s=turn_s)
    services = [
        mock_service(  # type: ignore[arg-type]
            MeteredClient(MemberClient(member, keeper), member.name), model_id=member.name, aliases=member.entry.aliases,
            is_default=i == 0,
        )
        for i, member in enumerate(members)
    ]  # fmt: skip
    services[0].client.metrics.add(FleetMetrics(keeper))  # type: ignore[attr-defined]
    keeper.start()
    return Fleet(services, tenants or {}, keeper)


def refused(error: RequestError, kind: ErrorKind, code: str | None = None) -> bool:
    return error.kind is kind and (code is None or error.code == code)


__all__ = ["FakeMember", "Where", "fleet_of", "refused"]
