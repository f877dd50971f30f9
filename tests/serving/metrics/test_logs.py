"""Logs: JSON that is all JSON, whoever writes; who asked for what, over both protocols; and no text of anybody's."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import pathlib
import re
import signal
import subprocess
import sys

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import inference_pb2, inference_pb2_grpc
from serving.access import Access, KeyRing
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from serving.metrics.logs import request_id_of_task, setup_logging
from serving.metrics.stderr_json import entries
from tests.mock_engine import MockEngine, mock_service

ROOT = pathlib.Path(__file__).parents[3]
SECRET = "sk-0123456789abcdef"


def test_logs_carry_the_request_and_its_fields():
    stream = io.StringIO()
    handler = setup_logging("json", stream=stream)
    token = request_id_of_task.set("req-7")
    try:
        logging.getLogger("serving.access").info("POST %s", "/x", extra={"fields": {"status": 200}})
        try:
            raise ValueError("broken")
        except ValueError:
            logging.getLogger("serving.test").exception("failed")
    finally:
        request_id_of_task.reset(token)
        logging.getLogger().removeHandler(handler)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert (first["request_id"], first["status"], first["message"]) == ("req-7", 200, "POST /x")
    assert "ValueError: broken" in second["exception"] and second["level"] == "error"


async def test_no_prompt_is_logged(caplog):
    caplog.set_level(logging.DEBUG)
    server = await serve_http(mock_service(MockEngine(reply="the secret answer")), port=0)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        await http.post("/v1/completions", json={"prompt": "my secret prompt"})
        await http.post("/v1/completions", json={"prompt": "my secret prompt", "temperature": -1})
    await server.stop()
    mine = [r.getMessage() for r in caplog.records if r.name.startswith("serving")]
    assert any("/v1/completions 200" in line for line in mine) and any(" 400 " in line for line in mine)
    assert not any("secret" in line for line in mine)


def _access_lines(caplog) -> list[dict]:
    return [record.fields for record in caplog.records if record.name == "serving.access"]


async def test_the_access_log_says_who_asked_for_what(caplog):
    caplog.set_level(logging.DEBUG, "serving.access")
    access = Access(KeyRing.of([SECRET]))
    server = await serve_http(mock_service(MockEngine(reply="a")), port=0, access=access)
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        for path in ("/v1/models", "/static/page.js", "/v1/models/a/b", "/nowhere/1", "/"):
            await http.get(path, headers={"Authorization": "Bearer wrong"})
            await http.get(path, headers={"Authorization": f"Bearer {SECRET}"})
        await http.put("/v1/models", headers={"Authorization": f"Bearer {SECRET}"})
    await server.stop()
    lines = _access_lines(caplog)
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    assert [line["path"] for line in lines] == [
        *["/v1/models"] * 2, *["/static/{file:path}"] * 2, *["/v1/models/{model:path}"] * 2, *["unmatched"] * 2, *["/"] * 2,
        "/v1/models",
    ]  # fmt: skip
    for line in lines:
        if line["path"] not in ("/", "/static/{file:path}"):
            assert (line["status"] == 401) == ("key" not in line), line
    assert {line.get("key") for line in lines} == {None, "key-1"}
    assert SECRET not in caplog.text and "/nowhere" not in caplog.text
    assert re.fullmatch(r"PUT /v1/models 405 [\d.]+s client=127.0.0.1 key=key-1", caplog.records[-1].getMessage())


async def test_refused_and_served_grpc_calls_are_logged_alike(caplog):
    caplog.set_level(logging.INFO, "serving.access")
    server = GrpcServer("127.0.0.1", 0, access=Access(KeyRing.of([SECRET])))
    await server.start()
    await server.serve(mock_service(MockEngine(reply="a")))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.GenerateRequest(text="hi")
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in stub.Generate(request):
                pass
        async for _ in stub.Generate(request, metadata=(("authorization", f"Bearer {SECRET}"),)):
            pass
    await server.stop(0.0)
    refused, served = _access_lines(caplog)
    assert (refused["path"], refused["status"]) == ("Generate", "UNAUTHENTICATED") and "key" not in refused
    assert (served["path"], served["status"], served["key"]) == ("Generate", "OK", "key-1")
    assert refused["client"] == served["client"] == "127.0.0.1"


def test_lines_of_others_become_entries():
    lines = [
        "plain\n", "\n", "error: no such model\n", "warning: no key\n", "\x1b[31mred\x1b[0m\n",
        "  0%|\r 50%|##\r100%|####\n", "E0000 00:00:1700000000.000001 12345 chttp2_server.cc:96] bind failed\n",
        '{"level": "info", "message": "ours"}\n', "{not json\n",
        "Traceback (most recent call last):\n", '  File "x.py", line 1\n', "\n", "ValueError: broken\n", "after\n",
        "Traceback (most recent call last):\n", "  cut",
    ]  # fmt: skip
    found = [(e["level"], e["message"]) for e in map(json.loads, entries(lines))]
    assert found == [
        ("info", "plain"),
        ("error", "error: no such model"),
        ("warning", "warning: no key"),
        ("info", "red"),
        ("info", "100%|####"),
        ("error", lines[6].rstrip()),
        ("info", "ours"),
        ("info", "{not json"),
        ("error", 'Traceback (most recent call last):\n  File "x.py", line 1\n\nValueError: broken'),
        ("info", "after"),
        ("error", "Traceback (most recent call last):\n  cut"),
    ]


def _all_json(text: str) -> list[dict]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in found)
    return found


async def test_every_line_of_a_server_is_json():
    command = [
        sys.executable,
        str(ROOT / "tests/mock_launch.py"),
        "--log-format",
        "json",
        "--port",
        "0",
        "--grpc-port",
        "0",
    ]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    assert process.stderr is not None
    lines = []
    async with asyncio.timeout(120):
        while "ready at" not in (lines[-1] if lines else ""):
            lines.append((await process.stderr.readline()).decode())
            assert lines[-1], "it ended"
        async with httpx.AsyncClient(timeout=60) as http:
            url = re.search(r"http://[\d.:]+", lines[-1])
            assert url is not None
            assert (await http.get(f"{url[0]}/v1/models")).status_code == 200
        process.send_signal(signal.SIGTERM)
        lines.append((await process.stderr.read()).decode())
        await process.wait()
    found = _all_json("".join(lines))
    assert any(entry.get("path") == "/v1/models" and entry["status"] == 200 for entry in found)
    assert "stopped" in found[-1]["message"]


def test_the_last_words_of_a_crash_are_json_too():
    program = (
        "import logging, os; from serving.metrics.logs import setup_logging; setup_logging('json');"
        "logging.getLogger('serving').info('ours'); os.write(2, b'F0000 00:00:1.1 7 a.cc:1] gone\\n'); os.abort()"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env={**os.environ}, check=False
    )
    assert found.returncode == -signal.SIGABRT
    assert sorted(entry["message"] for entry in _all_json(found.stderr)) == ["F0000 00:00:1.1 7 a.cc:1] gone", "ours"]


def test_the_log_ends_with_the_server_whatever_it_has_started():
    """A process that was started and lives on holds the pipe; nobody waits for it."""
    program = (
        "import subprocess, sys; from serving.metrics.logs import setup_logging; handler = setup_logging('json');"
        "left = subprocess.Popen(['sleep', '60']); print('half a line', end='', file=sys.stderr, flush=True);"
        "handler.close(); assert handler._beside.poll() == 0, 'it has read all and ended'; left.kill()"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
    assert found.returncode == 0, found.stderr
    assert [entry["message"] for entry in _all_json(found.stderr)] == ["half a line"]
