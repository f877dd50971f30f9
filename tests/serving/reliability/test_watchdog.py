"""The watchdog, crash reports, and telling that one is ready."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import threading
import time

import pytest

from serving.engine.api.types import EngineStats
from serving.engine.loop import StepTrace
from serving.errors import RequestError, invalid
from serving.reliability import crash_report
from serving.reliability.notify import notify
from serving.reliability.watchdog import StalledError, Watchdog
from tests.mock_engine import until


class Seen:
    def __init__(self):
        self.error = None
        self.told, self.gave_up = threading.Event(), threading.Event()

    def on_stall(self, error):
        self.error = error
        self.told.set()


def test_a_round_that_takes_too_long_is_told_and_then_ended():
    seen = Seen()
    began = time.monotonic() - 100
    Watchdog(lambda: began, 0.1, seen.on_stall, seen.gave_up.set, grace_s=0.05).start()
    assert seen.told.wait(60) and isinstance(seen.error, StalledError) and "one step" in str(seen.error)
    assert seen.gave_up.wait(60)


def test_it_gives_up_even_when_nobody_can_be_told():
    seen = Seen()

    def on_stall(error):
        raise RuntimeError

    Watchdog(lambda: 0.0, 0.1, on_stall, seen.gave_up.set, grace_s=0.0).start()
    assert seen.gave_up.wait(60)


def test_an_engine_that_works_or_idles_is_left_alone():
    seen, looks = Seen(), []

    def busy_since():
        looks.append(1)
        return time.monotonic() if len(looks) % 2 else None

    watchdog = Watchdog(busy_since, 0.08, seen.on_stall, seen.gave_up.set)
    watchdog.start()
    while len(looks) < 30:
        time.sleep(0.01)
    watchdog.stop()
    assert not seen.told.is_set() and not seen.gave_up.is_set()


async def test_an_event_loop_that_is_stuck_is_noticed():
    seen = Seen()
    watchdog = Watchdog(lambda: None, 3.0, seen.on_stall, seen.gave_up.set, asyncio.get_running_loop(), grace_s=60)
    watchdog.start()
    began = watchdog._answered
    await until(lambda: watchdog._answered > began + 0.5, "the loop answers again and again")
    assert not seen.told.is_set()
    deadline = time.monotonic() + 60
    while not seen.told.is_set() and time.monotonic() < deadline:
        time.sleep(0.01)  # noqa: ASYNC251 - blocking the loop is the point
    assert "event loop" in str(seen.error)
    watchdog.stop()


def test_a_timeout_of_nothing_is_refused():
    with pytest.raises(ValueError, match="watchdog_timeout"):
        Watchdog(lambda: None, 0, print, print)


def _error(make):
    prompt = "my secret prompt"
    try:
        raise make(prompt)
    except Exception as error:
        return error


def test_a_crash_report_says_what_happened_and_nobodys_text(tmp_path):
    steps = [StepTrace(7, 3, 64, 1, 0.01)]
    path = crash_report.write(
        tmp_path / "crashes",
        _error(KeyError),
        flags={"model": "m", "port": 1},
        stats=EngineStats(num_steps=7),
        steps=steps,
    )
    text = path.read_text()
    report = json.loads(text)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and "secret prompt" not in text
    assert report["error"]["type"] == "KeyError" and any("_error" in line for line in report["error"]["stack"])
    assert report["flags"] == {"model": "m", "port": "1"} and report["stats"]["num_steps"] == 7
    assert report["steps"] == [{"step_id": 7, "decode_rows": 3, "chunk_tokens": 64, "num_steps": 1, "seconds": 0.01}]
    assert any("MainThread" in name for name in report["threads"]) and report["versions"]["jax"]


def test_our_own_failures_say_their_message(tmp_path):
    path = crash_report.write(tmp_path, StalledError("one step for 9 s"), flags={})
    assert "one step for 9 s" in path.read_text()
    path = crash_report.write(tmp_path, _error(invalid), flags={})
    assert isinstance(_error(invalid), RequestError) and path is not None


def test_old_reports_are_removed_and_a_full_disk_raises_nothing(tmp_path):
    for i in range(crash_report.KEPT + 3):
        (tmp_path / f"crash-2000010{i:02}T000000Z-1.json").write_text("{}")
    assert crash_report.write(tmp_path, StalledError(), flags={}).exists()
    assert len(list(tmp_path.glob("crash-*.json"))) == crash_report.KEPT
    file = tmp_path / "file"
    file.write_text("")
    assert crash_report.write(file / "below", StalledError(), flags={}) is None


def test_readiness_is_told_by_systemds_protocol(tmp_path, monkeypatch):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(str(path))
        told.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        notify("READY=1")
        assert told.recv(100) == b"READY=1"
    notify("READY=1")  # nobody listens any more: nothing happens
    monkeypatch.delenv("NOTIFY_SOCKET")
    notify("READY=1")
