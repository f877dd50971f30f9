"""Keys, TLS and supervision through the server's own flags, in a process of its own."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import ssl
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from serving.access.keys import Role, file_line
from tests.serving.access import certificates

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "mock_launch.py"
KEY = "sk-alice-0123456789abcdef"


def launch(*args, **options):
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--grpc-port", "0", "--port", "0", *args],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "MOCK_LAUNCH": json.dumps(options)},
    )  # fmt: skip
    guard = threading.Timer(240, process.kill)
    guard.start()
    return process, guard


def read_until(process, pattern):
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(pattern, line):
            return found, "".join(lines)
    raise AssertionError(f"{pattern!r} never came:\n{''.join(lines)}")


def test_a_server_with_keys_and_tls(tmp_path):
    certificates.make(tmp_path)
    file = tmp_path / "keys"
    file.write_text(file_line("alice", Role.USER, KEY) + "\n")
    tls = ("--ssl-keyfile", f"{tmp_path}/server.key", "--ssl-certfile", f"{tmp_path}/server.pem")
    process, guard = launch("--api-key-file", str(file), *tls)
    try:
        found, said = read_until(process, r"ready at gRPC \S+, https://127\.0\.0\.1:(\d+)")
        assert KEY not in said
        context = ssl.create_default_context(cafile=f"{tmp_path}/ca.pem")
        url = f"https://127.0.0.1:{found[1]}/v1/models"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url, context=context, timeout=60)
        assert refused.value.code == 401
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request, context=context, timeout=60) as reply:
            assert b"mock" in reply.read()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def test_the_environment_holds_keys_too(monkeypatch):
    monkeypatch.setenv("JAXSERVE_API_KEY", KEY)
    process, guard = launch("--host", "0.0.0.0")
    try:
        found, said = read_until(process, r"http://0\.0\.0\.0:(\d+)")
        assert "without TLS" in said and "without an API key" not in said and KEY not in said
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/v1/models", timeout=60)
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/health", timeout=60) as reply:
            assert reply.status == 200
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--api-key", "two words"), "printable ASCII"),
        (("--api-key-file", "/nowhere/keys"), "cannot be read"),
        (("--ssl-keyfile", "x"), "go together"),
        (("--ssl-cert-reqs", "2"), "--ssl-ca-certs"),
        (("--requests-per-minute", "0"), "at least 1"),
        (("--inject-fault", "meteor"), "KIND one of"),
    ],
)
def test_wrong_flags_are_told(flags, sentence):
    process, guard = launch(*flags)
    try:
        _, text = process.communicate(timeout=60)
    finally:
        guard.cancel()
        process.kill()
    assert process.returncode == 2 and sentence in text and "Traceback" not in text and "two words" not in text


def test_a_dead_engine_leaves_a_crash_report(tmp_path):
    process, guard = launch("--crash-dir", str(tmp_path / "crashes"), "--admin-api-key", KEY, die_after_s=0.5)
    try:
        _, text = process.communicate(timeout=60)
    finally:
        guard.cancel()
        process.kill()
    (report,) = (tmp_path / "crashes").glob("*.json")
    found = json.loads(report.read_text())
    assert process.returncode == 1 and str(report) in text
    assert (
        found["error"]["message"] == "mock engine died"
        and found["flags"]["port"] == "0"
        and KEY not in report.read_text()
    )
