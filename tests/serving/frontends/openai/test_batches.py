"""/v1/files and /v1/batches over the official client: run, parted into answers and errors, cancelled, gone on with."""

from __future__ import annotations

import asyncio
import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from serving.access import Access, KeyRing
from serving.storage import Store, StoreSettings
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import HI, Running, Start

KEYS = ("a-key-of-some-length", "another-key-of-length")
CHAT = "/v1/chat/completions"


def lines(*bodies: dict[str, Any], url: str = CHAT) -> bytes:
    entries = [{"custom_id": f"c{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


GOOD: dict[str, Any] = {"messages": HI}


@pytest.fixture
async def store(tmp_path: pathlib.Path) -> AsyncIterator[Store]:
    made = Store(StoreSettings(tmp_path / "store"))
    yield made
    await made.stop()


async def batch_of(client: openai.AsyncOpenAI, raw: bytes) -> Any:
    file = await client.files.create(file=("in.jsonl", raw), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"a": "b"}
    )


async def ended(running: Running, batch_id: str, client: openai.AsyncOpenAI | None = None) -> Any:
    task = running.app.state.batches._tasks.get(batch_id)
    if task is not None:
        await asyncio.wait({task})
    return await (client or running.client).batches.retrieve(batch_id)


async def test_files_are_kept_listed_read_and_deleted(start: Start, store: Store):
    files = (await start(app={"store": store})).client.files
    made = await files.create(file=("a.jsonl", b"one"), purpose="batch")
    assert made.bytes == 3 and made.filename == "a.jsonl" and made.status == "processed"
    other = await files.create(file=("b.txt", b"two"), purpose="user_data")
    assert [file.id async for file in files.list()] == [other.id, made.id]
    assert [file.id async for file in files.list(purpose="batch")] == [made.id]
    assert (await files.content(made.id)).content == b"one"
    assert (await files.retrieve(made.id)).id == made.id and (await files.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await files.content(made.id)
    assert [path.name for path in (store.folder / "files").iterdir()] == [other.id]
    with pytest.raises(openai.BadRequestError):
        await files.create(file=("a", b""), purpose="nothing")  # type: ignore[arg-type]


async def test_a_batch_is_run_and_its_results_parted(start: Start, store: Store):
    running = await start(MockEngine(reply="Hello"), app={"store": store})
    made = await batch_of(running.client, lines(GOOD, {**GOOD, "temperature": -1}, {**GOOD, "max_tokens": 2}))
    assert made.status == "validating" and made.metadata == {"a": "b"}
    done = await ended(running, made.id)
    assert done.status == "completed" and done.completed_at
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 2, 1)
    answers = [json.loads(line) for line in (await running.client.files.content(done.output_file_id)).text.splitlines()]
    texts = {one["custom_id"]: one["response"]["body"]["choices"][0]["message"]["content"] for one in answers}
    assert texts == {"c0": "Hello", "c2": "He"}
    (error,) = [json.loads(line) for line in (await running.client.files.content(done.error_file_id)).text.splitlines()]
    assert error["custom_id"] == "c1" and error["response"]["status_code"] == 400
    assert [one.id async for one in running.client.batches.list()] == [made.id]


async def test_a_file_that_is_no_batch_fails_as_a_whole(start: Start, store: Store):
    running = await start(app={"store": store})
    for raw, text in ((b"{}\n", "custom_id"), (lines(GOOD, url="/v1/completions"), "endpoint"), (b"", "requests")):
        failed = await ended(running, (await batch_of(running.client, raw)).id)
        assert failed.status == "failed" and text in failed.errors.data[0].message
    assert not running.engine.requests


async def test_a_batch_is_cancelled_and_keeps_what_it_has(start: Start, store: Store):
    running = await start(MockEngine(reply="x" * 300, step_s=0.01), app={"store": store})
    made = await batch_of(running.client, lines({**GOOD, "max_tokens": 1}, GOOD))
    while (await running.client.batches.retrieve(made.id)).request_counts.completed < 1:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    cancelled = await running.client.batches.cancel(made.id)
    assert cancelled.status == "cancelled" and cancelled.request_counts.completed == 1 and cancelled.output_file_id
    with pytest.raises(openai.BadRequestError):
        await running.client.batches.cancel(made.id)


async def test_a_batch_goes_on_after_a_restart(start: Start, tmp_path: pathlib.Path):
    folder = tmp_path / "s"
    store = Store(StoreSettings(folder))
    running = await start(MockEngine(reply="x" * 300, step_s=0.01), app={"store": store})
    made = await batch_of(running.client, lines({**GOOD, "max_tokens": 1}, GOOD))
    while (await running.client.batches.retrieve(made.id)).request_counts.completed < 1:  # noqa: ASYNC110
        await asyncio.sleep(0.02)
    await store.stop()
    again = Store(StoreSettings(folder))
    fresh = await start(MockEngine(reply="done"), app={"store": again})
    done = await ended(fresh, made.id)
    assert done.status == "completed" and done.request_counts.completed == 2 and len(fresh.engine.requests) == 1
    await again.stop()


async def test_files_and_batches_are_their_tenants(start: Start, store: Store):
    ring = KeyRing.of(list(KEYS))
    running = await start(MockEngine(reply="secret"), app={"store": store, "access": Access(ring)})
    mine, others = (openai.AsyncOpenAI(base_url=f"{running.server.url}/v1", api_key=key, max_retries=0) for key in KEYS)
    made = await batch_of(mine, lines(GOOD))
    done = await ended(running, made.id, mine)
    assert running.engine.requests[0].tenant == "key-1"
    for run in (
        others.batches.retrieve(made.id),
        others.batches.cancel(made.id),
        others.files.content(done.output_file_id),
        others.files.retrieve(made.input_file_id),
        others.files.delete(made.input_file_id),
        others.batches.create(input_file_id=made.input_file_id, endpoint=CHAT, completion_window="24h"),
    ):
        with pytest.raises(openai.NotFoundError):
            await run
    assert not (await others.files.list()).data and not (await others.batches.list()).data
    for client in (mine, others):
        await client.close()


async def test_without_a_store_there_are_none(running: Running):
    with pytest.raises(openai.BadRequestError, match="store-dir"):
        await running.client.files.create(file=("a", b"x"), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="store-dir"):
        await running.client.batches.list()


async def test_pages_of_other_origins_send_no_files(start: Start, store: Store):
    running = await start(app={"store": store})
    form: Any = {"files": {"file": ("a", b"x")}, "data": {"purpose": "batch"}}
    assert (await running.http.post("/v1/files", **form, headers={"sec-fetch-site": "cross-site"})).status_code == 403
    assert (await running.http.post("/v1/files", **form)).status_code == 200
