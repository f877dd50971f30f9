"""/v1/responses and /v1/conversations where the server has a store: followed on, asked for, run in the background, one tenant's."""

from __future__ import annotations

import json
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from serving.access import Access, KeyRing
from serving.storage import Store, StoreSettings
from tests.mock_engine import MockEngine
from tests.serving.frontends.conftest import Running, Start

PATH = "/v1/responses"
KEYS = ("a-key-of-some-length", "another-key-of-length")


@pytest.fixture
async def store(tmp_path: pathlib.Path) -> AsyncIterator[Store]:
    made = Store(StoreSettings(tmp_path / "store"))
    yield made
    await made.stop()


@pytest.fixture
async def kept(start: Start, store: Store) -> Running:
    """A server with a store."""
    return await start(MockEngine(reply="R. "), app={"store": store})


def prompt(running: Running, which: int = -1) -> str:
    return bytes(i for i in running.engine.requests[which].prompt_token_ids if i < 256).decode()


async def test_a_response_follows_on_others(kept: Running):
    client = kept.client.responses
    first = await client.create(model="mock", input="one ", instructions="Be short. ")
    assert first.output_text == "R. " and first.store  # type: ignore[attr-defined]
    second = await client.create(model="mock", input="two ", previous_response_id=first.id)
    third = await client.create(
        model="mock", input=[{"role": "user", "content": "three"}], previous_response_id=second.id
    )
    assert third.previous_response_id == second.id
    assert prompt(kept) == "one R. two R. three"
    assert (await client.retrieve(second.id)).output_text == second.output_text
    items = [item async for item in client.input_items.list(third.id, order="asc", limit=2)]
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant", "user"]  # type: ignore[union-attr]
    assert all(item.id for item in items)
    newest = await client.input_items.list(third.id)
    assert newest.data[0].content[0].text == "three" and not newest.has_more  # type: ignore[union-attr]
    counted = await client.input_tokens.count(model="mock", input="x", previous_response_id=first.id)
    assert counted.input_tokens > 12
    await client.delete(first.id)
    for wanted in (first.id, "resp_nobody"):
        with pytest.raises(openai.NotFoundError):
            await client.retrieve(wanted)
    with pytest.raises(openai.NotFoundError):
        await client.create(model="mock", input="x", previous_response_id=third.id)


async def test_an_item_is_referred_to(kept: Running):
    first = await kept.client.responses.create(model="mock", input="one")
    given: Any = [{"type": "item_reference", "id": first.output[0].id}, {"role": "user", "content": "two"}]
    await kept.client.responses.create(model="mock", input=given)
    assert prompt(kept) == "R. two"


async def test_what_is_not_to_be_kept_is_not(kept: Running):
    reply = await kept.client.responses.create(model="mock", input="x", store=False)
    with pytest.raises(openai.NotFoundError):
        await kept.client.responses.retrieve(reply.id)
    for fields in ({"background": True, "store": False}, {"previous_response_id": "a", "conversation": "b"}):
        refused = await kept.http.post(PATH, json={"input": "x", **fields})
        assert refused.status_code == 400, refused.text


async def test_streamed_responses_are_kept_before_they_end(kept: Running):
    async with kept.client.responses.stream(model="mock", input="streamed") as stream:
        async for event in stream:
            if event.type == "response.completed":
                assert (await kept.client.responses.retrieve(event.response.id)).output_text == "R. "


async def test_conversations(kept: Running):
    conversations = kept.client.conversations
    made = await conversations.create(items=[{"role": "user", "content": "zero "}], metadata={"a": "b"})
    await kept.client.responses.create(model="mock", input="one ", conversation=made.id)
    await kept.client.responses.create(model="mock", input="two", conversation={"id": made.id})
    assert prompt(kept) == "zero one R. two"
    items = [item async for item in conversations.items.list(made.id, order="asc", limit=3)]
    texts = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert texts == ["zero ", "one ", "R. ", "two", "R. "]
    one = await conversations.items.retrieve(items[1].id or "", conversation_id=made.id)
    assert one.content[0].text == "one "  # type: ignore[union-attr]
    await conversations.items.delete(items[1].id or "", conversation_id=made.id)
    added = await conversations.items.create(made.id, items=[{"role": "user", "content": "more"}])
    assert len(added.data) == 1
    assert (await conversations.update(made.id, metadata={"c": "d"})).metadata == {"c": "d"}
    assert (await conversations.retrieve(made.id)).metadata == {"c": "d"}
    assert (await conversations.delete(made.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await kept.client.responses.create(model="mock", input="x", conversation=made.id)


async def test_in_the_background(start: Start, store: Store):
    running = await start(MockEngine(reply="a slow answer", step_s=0.01), app={"store": store})
    client = running.client.responses
    begun = await client.create(model="mock", input="x", background=True)
    assert begun.status in ("queued", "in_progress") and begun.background
    with pytest.raises(openai.APIStatusError):
        await client.create(model="mock", input="x", previous_response_id=begun.id)
    async for _ in await client.retrieve(begun.id, stream=True):  # ends with it
        pass
    reply = await client.retrieve(begun.id)
    assert reply.status == "completed" and reply.output_text == "a slow answer"
    with pytest.raises(openai.BadRequestError):
        await client.cancel((await client.create(model="mock", input="x")).id)


async def test_a_background_stream_is_left_and_followed_again(start: Start, store: Store):
    running = await start(MockEngine(reply="a slow answer", step_s=0.01), app={"store": store})
    client = running.client.responses
    seen: list[Any] = []
    stream = await client.create(model="mock", input="x", background=True, stream=True)
    async for event in stream:
        seen.append(event)
        if len(seen) == 5:
            break
    await stream.close()
    made = seen[0].response.id
    for _ in range(2):  # while it runs, and out of the store
        again = await client.retrieve(made, stream=True, starting_after=seen[-1].sequence_number)
        rest = [event async for event in again]
        numbers = [event.sequence_number for event in seen + rest]
        assert numbers == list(range(len(numbers))) and rest[-1].type == "response.completed"
        deltas = [e.delta for e in seen + rest if e.type == "response.output_text.delta"]
        assert "".join(deltas) == "a slow answer"


async def test_a_background_response_is_cancelled(start: Start, store: Store):
    engine = MockEngine(reply="x" * 400, step_s=0.01)
    running = await start(engine, app={"store": store})
    begun = await running.client.responses.create(model="mock", input="x", background=True)
    async for event in await running.client.responses.retrieve(begun.id, stream=True):
        if event.type == "response.in_progress":
            break
    assert (await running.client.responses.cancel(begun.id)).status == "cancelled"
    assert not engine.live and (await running.client.responses.retrieve(begun.id)).status == "cancelled"
    assert (await running.client.responses.cancel(begun.id)).status == "cancelled"


async def test_one_that_the_servers_end_cut_has_failed(start: Start, tmp_path: pathlib.Path):
    store = Store(StoreSettings(tmp_path / "s"))
    running = await start(MockEngine(reply="x" * 400, step_s=0.01), app={"store": store})
    begun = await running.client.responses.create(model="mock", input="x", background=True)
    store.closing.clear()
    store.close()  # as if the process had been killed
    again = Store(StoreSettings(tmp_path / "s"))
    fresh = await start(MockEngine(), app={"store": again})
    found = await fresh.client.responses.retrieve(begun.id)
    assert found.status == "failed" and found.error
    await again.stop()


async def test_one_tenants_entries_are_nobody_elses(start: Start, store: Store):
    ring = KeyRing.of(list(KEYS))
    running = await start(MockEngine(reply="secret"), app={"store": store, "access": Access(ring)})
    mine, others = (openai.AsyncOpenAI(base_url=f"{running.server.url}/v1", api_key=key, max_retries=0) for key in KEYS)
    response = await mine.responses.create(model="mock", input="x")
    conversation = await mine.conversations.create(items=[{"role": "user", "content": "x"}])
    background = await mine.responses.create(model="mock", input="x", background=True)
    for run in (
        others.responses.retrieve(response.id),
        others.responses.delete(response.id),
        others.responses.cancel(background.id),
        others.responses.input_items.list(response.id),
        others.responses.create(model="mock", input="x", previous_response_id=response.id),
        others.responses.create(model="mock", input="x", conversation=conversation.id),
        others.conversations.retrieve(conversation.id),
        others.conversations.items.list(conversation.id),
        others.conversations.delete(conversation.id),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            await run
        assert "secret" not in json.dumps(refused.value.body)
    assert (await mine.responses.retrieve(response.id)).output_text == "secret"
    for client in (mine, others):
        await client.close()
