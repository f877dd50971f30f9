"""The supervisor over small programs that die in all ways, and over the server itself."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
CHILD = """
    import os, pathlib, signal, sys, time
    from serving.reliability.notify import notify
    runs = pathlib.Path(sys.argv[1]) / "runs"
    runs.write_text((runs.read_text() if runs.exists() else "") + ".")
    n = len(runs.read_text())
"""
PARENT = """
    import sys
    from serving.reliability.supervisor import Supervisor
    sys.exit(Supervisor([sys.executable, "-c", open(sys.argv[1]).read(), sys.argv[2]], first_delay_s=0.01).run())
"""


def supervised(tmp_path, code) -> subprocess.Popen:
    child = tmp_path / "child.py"
    child.write_text(textwrap.dedent(CHILD) + textwrap.dedent(code))
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(PARENT), str(child), str(tmp_path)],
        stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip


def end(process) -> tuple[int, str]:
    try:
        _, text = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, text


def runs(tmp_path) -> int:
    return len((tmp_path / "runs").read_text())


@pytest.mark.parametrize("death", ["os._exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(75)"])
def test_what_dies_is_started_again_and_what_ends_well_is_not(tmp_path, death):
    status, text = end(supervised(tmp_path, f"notify('READY=1')\nif n < 3: {death}\n"))
    assert (status, runs(tmp_path)) == (0, 3) and text.count("starting it again") == 2
    delays = [float(d) for d in re.findall(r"in ([\d.]+) s$", text, re.M)]
    assert delays == [0.01, 0.02], "longer each time"


def test_a_first_start_that_fails_is_not_tried_again(tmp_path):
    status, text = end(supervised(tmp_path, "os._exit(1)"))
    assert (status, runs(tmp_path)) == (1, 1) and "giving up" in text


def test_wrong_flags_are_not_tried_again(tmp_path):
    assert end(supervised(tmp_path, "notify('READY=1'); os._exit(2)"))[0] == 2 and runs(tmp_path) == 1


def test_it_gives_up_on_a_server_that_does_not_become_ready_any_more(tmp_path):
    status, text = end(supervised(tmp_path, "if n == 1: notify('READY=1')\nos._exit(3)"))
    assert status == 3 and runs(tmp_path) == 6 and "giving up" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_once_and_nothing_is_started_again(tmp_path, number):
    code = """
        seen = []
        def on(n, f):
            seen.append(n)
            print("got", n, file=sys.stderr, flush=True)
        signal.signal(signal.SIGTERM, on); signal.signal(signal.SIGINT, on)
        notify("READY=1")
        print("child is", os.getpid(), file=sys.stderr, flush=True)
        while not seen: time.sleep(0.01)
        time.sleep(0.2)
        os._exit(0 if len(seen) == 1 else 9)
    """
    process = supervised(tmp_path, code)
    assert process.stderr is not None
    assert "child is" in process.stderr.readline()
    process.send_signal(number)
    status, _ = end(process)
    assert (status, runs(tmp_path)) == (0, 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_the_server_does_not_outlive_a_supervisor_that_is_killed(tmp_path):
    process = supervised(tmp_path, "print('child is', os.getpid(), file=sys.stderr, flush=True)\ntime.sleep(300)")
    assert process.stderr is not None
    child = int(process.stderr.readline().split()[-1])
    process.kill()
    try:
        process.communicate(timeout=120)  # the pipe ends when the child, which holds its other end too, has ended
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)


def test_a_server_knows_how_often_it_was_started_again(tmp_path):
    """So that a fault on purpose strikes its first life alone."""
    from serving.reliability.faults import wanted

    code = (
        "notify('READY=1'); print('life', os.environ['SUPERVISED_RESTARTS'], file=sys.stderr, flush=True)\n"
        "if n < 3: os._exit(1)\n"
    )
    _, text = end(supervised(tmp_path, code))
    assert re.findall(r"life (\d)", text) == ["0", "1", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERVISED_RESTARTS", "0")
        assert [fault.kind for fault in wanted(["stall@3"])] == ["stall"]
        patch.setenv("SUPERVISED_RESTARTS", "1")
        assert wanted(["stall@3"]) == []
