"""Requests for models that are not loaded: who waits, who is answered, who is refused, and what became of the others."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serving.engine.api.client import Where
from serving.engine.api.sampling_params import SamplingParams
from serving.errors import ErrorKind, RequestError
from serving.service import GenerateInput, collect
from tests.mock_engine import until
from tests.serving.fleet.fakes import FakeMember, fleet_of, refused


async def ask(fleet, model, **fields):
    service = fleet.of(model)
    given = GenerateInput(text="hello", model=model, **fields)
    prepared = await service.prepare(given, SamplingParams(max_tokens=64))
    return (await collect(prepared, service.generate(prepared))).outputs[0].text


async def test_each_model_is_loaded_when_it_is_asked_for_and_answers_for_itself():
    members = [FakeMember(name) for name in "abc"]
    fleet = fleet_of(*members)
    assert [await ask(fleet, name) for name in "abcabc"] == [f"I am {name}." for name in "abcabc"]
    # Memory for two: c's coming sent a away, a's coming b, and so on.
    assert [one.changes for one in members] == [
        ["load", "sleep", "wake", "sleep"],
        ["load", "sleep", "wake"],
        ["load", "sleep", "wake"],
    ]
    assert sum(one.bytes for one in members) <= 20
    await fleet.abort_all()


async def test_many_requests_at_once_are_all_answered_right_within_the_memory():
    members = [FakeMember(name, step_s=0.001, load_s=0.005) for name in "abc"]
    fleet = fleet_of(*members, turn_s=0.02)
    most = 0

    async def watch():
        nonlocal most
        while True:
            most = max(most, sum(one.bytes for one in members))
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    names = [name for _ in range(12) for name in "abc"]
    assert await asyncio.gather(*(ask(fleet, name) for name in names)) == [f"I am {name}." for name in names]
    watching.cancel()
    assert most <= 20 and all(not one.in_use for one in members)
    await fleet.abort_all()


async def test_a_model_that_fits_nowhere_is_refused_at_once_and_said_why():
    fleet = fleet_of(FakeMember("a", pinned=True), FakeMember("big", 30), FakeMember("b", 15))
    await ask(fleet, "a")
    for name in ("big", "b"):
        with pytest.raises(
            RequestError, match=r"needs .* all models may take .* of which .* are taken by pinned models"
        ) as caught:
            await ask(fleet, name)
        assert refused(caught.value, ErrorKind.RESOURCE_EXHAUSTED, "model_too_large")
    await fleet.abort_all()


async def test_a_wait_has_an_end_and_the_requests_own_time_counts():
    slow = FakeMember("slow")
    slow.gate = threading.Event()
    fleet = fleet_of(slow, wait_s=0.05)
    try:
        with pytest.raises(RequestError, match=r"not ready within 0.05 s \(slow is loading\)") as caught:
            await ask(fleet, "slow")
        assert refused(caught.value, ErrorKind.UNAVAILABLE, "model_not_ready") and caught.value.retry_after_s
        with pytest.raises(RequestError) as caught:
            await ask(fleet, "slow", timeout_s=0.01)
        assert refused(caught.value, ErrorKind.DEADLINE_EXCEEDED)
    finally:
        slow.gate.set()
    await until(lambda: slow.ready, "it goes on loading for those to come")
    assert await ask(fleet, "slow") == "I am slow."
    await fleet.abort_all()


async def test_a_model_that_cannot_be_loaded_is_refused_without_its_path_and_tried_again():
    broken = FakeMember("broken")
    broken.fails = True
    fleet = fleet_of(broken)
    with pytest.raises(RequestError) as caught:
        await ask(fleet, "broken")
    assert refused(caught.value, ErrorKind.UNAVAILABLE, "model_not_loaded") and "secret" not in caught.value.message
    residence = fleet.of("broken").client.residence
    assert residence.where is Where.FAILED and "secret" not in residence.error
    broken.fails = False
    assert await ask(fleet, "broken") == "I am broken." and residence.where is Where.LOADED and residence.error is None
    await fleet.abort_all()


async def test_an_engine_that_died_is_made_anew_for_the_next_request():
    member = FakeMember("a")
    fleet = fleet_of(member)
    await ask(fleet, "a")
    member.mock.die()
    assert fleet.of("a").client.residence.where is Where.FAILED
    assert await ask(fleet, "a") == "I am a." and member.changes.count("load") == 2
    await fleet.abort_all()


async def test_a_busy_model_gives_way_after_its_turn_and_comes_back_for_what_waits():
    busy, other = FakeMember("busy", 15, step_s=0.02), FakeMember("other", 15)
    fleet = fleet_of(busy, other, turn_s=0.05)
    long = asyncio.create_task(ask(fleet, "busy"))
    await until(lambda: busy.mock.live, "the long request to run")
    assert await ask(fleet, "other") == "I am other."
    assert "sleep" in busy.changes
    assert await long == "I am busy."
    await until(lambda: busy.ready, "it is woken for the request that waits")
    await fleet.abort_all()


async def test_an_idle_model_sleeps_after_its_time_unless_it_is_pinned():
    idle, pinned = FakeMember("idle", keep_alive=0.03), FakeMember("pinned", keep_alive=0.03, pinned=True)
    fleet = fleet_of(idle, pinned)
    await ask(fleet, "idle")
    await ask(fleet, "pinned")
    await until(lambda: idle.where is Where.SLEEPING, "the idle one to sleep")
    assert pinned.ready
    assert (
        fleet.of("idle").client.residence.idle_until_s == 0.0
        and fleet.of("pinned").client.residence.idle_until_s is None
    )
    assert await ask(fleet, "idle") == "I am idle." and idle.changes[-1] == "wake"
    await fleet.abort_all()


async def test_admins_load_have_it_sleep_and_unload_and_what_runs_is_not_cut():
    a, b = FakeMember("a", step_s=0.01), FakeMember("b")
    fleet = fleet_of(a, b)
    where = fleet.of("a").client.residence
    await where.load()
    assert where.where is Where.LOADED and where.device_bytes == 10
    running = asyncio.create_task(ask(fleet, "a"))
    await until(lambda: a.mock.live, "the request to run")
    with pytest.raises(RequestError, match="1 requests run with 'a'") as caught:
        await where.unload()
    assert refused(caught.value, ErrorKind.FAILED_PRECONDITION)
    assert await running == "I am a."
    await where.sleep()
    assert where.where is Where.SLEEPING and where.device_bytes == 0
    await where.unload()
    assert where.where is Where.UNLOADED and a.engine is None
    where.pin(True)
    await where.load()
    assert where.pinned and a.resident().pinned
    await fleet.abort_all()


async def test_a_request_that_is_ended_while_it_waits_ends_and_a_model_nobody_waits_for_is_not_loaded():
    first, second = FakeMember("first", 20, step_s=0.01), FakeMember("second", 20)
    fleet = fleet_of(first, second, turn_s=60.0)
    running = asyncio.create_task(ask(fleet, "first"))
    await until(lambda: first.mock.live, "the first to run")
    waiting = asyncio.create_task(ask(fleet, "second", request_id="late"))
    await until(lambda: second.in_use, "the second to wait")
    residence = fleet.of("second").client.residence
    place = "second is unloaded and number 1 of those that wait to be loaded"
    await until(lambda: residence.progress == place, "it to have its place")
    assert await fleet.abort("late")
    assert await waiting == ""
    assert await running == "I am first."
    await asyncio.sleep(0.02)
    assert second.changes == []
    await fleet.abort_all()


async def test_names_are_those_of_models_then_of_none_and_each_tenant_sees_its_own():
    a, b = FakeMember("a", aliases=("gpt",)), FakeMember("b", aliases=("claude",))
    fleet = fleet_of(a, b)
    assert [fleet.of(name).model_id for name in (None, "", "default", "a", "gpt", "b", "claude")] == ["a"] * 5 + [
        "b"
    ] * 2
    assert "default" not in fleet.of("b").model_names
    with pytest.raises(RequestError, match="'none' does not exist; this server serves 'a', 'b'") as caught:
        fleet.of("none")
    assert refused(caught.value, ErrorKind.NOT_FOUND, "model_not_found")
    await fleet.abort_all()
