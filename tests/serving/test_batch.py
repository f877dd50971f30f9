"""Batch files over the mock engine: results, failures by line, and going on after a kill."""

from __future__ import annotations

import asyncio
import json
import pathlib

import pytest

from serving.batch import finished_keys, main, run_batch
from serving.frontends.app import create_app
from tests.mock_engine import MockEngine, mock_service
from tests.serving.frontends.openai.test_server_routes import EmbeddingEngine

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def _line(custom_id, url="/v1/chat/completions", body=CHAT, **more) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body, **more})


def _write(path: pathlib.Path, *lines: str) -> pathlib.Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _read(path: pathlib.Path) -> dict[str, dict]:
    return {entry["id"]: entry for entry in map(json.loads, path.read_text().splitlines())}


async def _run(engine, source, target, concurrency=4):
    app = create_app(mock_service(engine), page=False)
    return await run_batch(app, source, target, concurrency=concurrency)


async def test_every_endpoint_and_every_failure_gets_its_line(tmp_path):
    source = _write(
        tmp_path / "in.jsonl",
        _line("chat"),
        _line("text", "/v1/completions", {"prompt": "a", "max_tokens": 2}),
        _line("vector", "/v1/embeddings", {"input": "ab"}),
        _line("response", "/v1/responses", {"input": "ab"}),
        _line("bad", body={**CHAT, "temperature": -1}),
        _line("chat"),
        "not json",
        _line("where", "/v1/images"),
        _line("streams", body={**CHAT, "stream": True}),
        _line(None),
        "",
    )
    summary = await _run(EmbeddingEngine(reply="yes"), source, tmp_path / "out.jsonl")
    out = _read(tmp_path / "out.jsonl")
    assert len(out) == 10 and summary.succeeded == 4 and summary.skipped == 0
    assert [number for number, _, _ in summary.failures] == [5, 6, 7, 8, 9, 10]
    assert out["batch_req_1"]["response"]["body"]["choices"][0]["message"]["content"] == "yes"
    assert out["batch_req_2"]["response"]["body"]["choices"][0]["text"] == "ye"
    assert len(out["batch_req_3"]["response"]["body"]["data"][0]["embedding"]) == 4
    assert out["batch_req_4"]["response"]["body"]["status"] == "completed"
    assert out["batch_req_5"]["response"]["status_code"] == 400
    assert out["batch_req_5"]["response"]["body"]["error"]["param"] == "temperature"
    assert "earlier line" in out["batch_req_6"]["error"]["message"]
    assert out["batch_req_7"]["custom_id"] is None and out["batch_req_7"]["response"] is None


async def test_a_killed_run_goes_on_where_it_was(tmp_path):
    source = _write(tmp_path / "in.jsonl", *(_line(f"r{i}") for i in range(20)))
    target = tmp_path / "out.jsonl"
    first = MockEngine(reply="abc", step_s=0.002)
    task = asyncio.ensure_future(_run(first, source, target, concurrency=2))
    while not target.exists() or target.read_bytes().count(b"\n") < 6:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert not first.live
    done = target.read_bytes().count(b"\n")
    with target.open("ab") as file:
        file.write(b'{"id": "batch_req_9", "custom')  # killed while writing
    second = MockEngine(reply="abc")
    summary = await _run(second, source, target)
    assert summary.skipped == done and summary.succeeded == 20 - done == len(second.requests)
    assert len(_read(target)) == 20 == target.read_bytes().count(b"\n")
    third = MockEngine(reply="abc")
    assert (await _run(third, source, target)).skipped == 20 and not third.requests


async def test_the_servers_failures_are_tried_again_and_the_requests_own_are_not(tmp_path):
    source = _write(tmp_path / "in.jsonl", _line("a"), _line("b", body={**CHAT, "n": 0}))
    engine = MockEngine(reply="abc")
    engine.fail_next = "NaN"
    assert len((await _run(engine, source, tmp_path / "out.jsonl")).failures) == 2
    summary = await _run(engine, source, tmp_path / "out.jsonl")
    assert (summary.skipped, summary.succeeded, summary.failures) == (1, 1, [])
    assert _read(tmp_path / "out.jsonl")["batch_req_1"]["response"]["status_code"] == 200


async def test_a_full_queue_is_waited_for(tmp_path):
    source = _write(tmp_path / "in.jsonl", *(_line(f"r{i}") for i in range(8)))
    summary = await _run(MockEngine(reply="abc", max_live=2), source, tmp_path / "out.jsonl", concurrency=8)
    assert summary.succeeded == 8


def test_another_file_is_not_overwritten(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("my notes\nmore\n")
    with pytest.raises(ValueError, match="not the output of a batch"):
        finished_keys(notes)
    assert notes.read_text() == "my notes\nmore\n"


def test_wrong_flags_are_told_before_a_model_is_loaded(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["-i", str(tmp_path / "missing.jsonl"), "-o", str(tmp_path / "out.jsonl")])
    assert caught.value.code == 2 and "missing.jsonl" in capsys.readouterr().err
