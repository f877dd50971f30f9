"""Real processes whose pages go from device to device: the tokens of one engine, and an engine that is killed in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import pytest

from tests.serving.transfer.test_real_processes import DEADLINE_S, Fleet, prompt, shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="jax has transfer servers on Linux"),
]


class DeviceFleet(Fleet):
    """On a single device each."""

    mesh = ()
    gives = '{"lease_s": 2.0, "transport": "device"}'
    takes = '{"stall_s": 1.5, "timeout_s": 8.0, "transport": "device"}'


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    made = DeviceFleet(tmp_path_factory.mktemp("fleet"))
    yield made
    made.close()


async def test_from_device_to_device(fleet):
    requests = list(shapes())[:24]
    alone = [await fleet.ask("decode", tokens, 120, cache_salt="alone", **more) for tokens, more in requests]
    apart = await asyncio.gather(
        *(fleet.ask("gateway", tokens, 120, cache_salt="apart", **more) for tokens, more in requests)
    )
    for (status, found), (_, expected) in zip(apart, alone, strict=True):
        assert status == 200, found
        for one, other in zip(found["choices"], expected["choices"], strict=True):
            assert (one["token_ids"], one["text"]) == (other["token_ids"], other["text"])
    figures = await fleet.figures("decode")
    assert figures["kv_transfer_device_bytes_total:in"] > 0, await fleet.why()
    await fleet.nothing_left()


async def test_an_engine_that_is_frozen_or_killed_in_the_middle(fleet):
    tokens = prompt(220, 3)
    answer = await fleet.tokens("decode", tokens, cache_salt="alone", max_tokens=30)
    ask = {"do_remote_decode": True, "do_remote_prefill": False}
    _, reply = await fleet.ask("prefill", tokens, max_tokens=1, kv_transfer_params=ask, cache_salt="frozen")
    prefill = fleet.processes["prefill"].popen.pid
    os.kill(prefill, signal.SIGSTOP)
    more = {"kv_transfer_params": reply["kv_transfer_params"], "cache_salt": "frozen", "max_tokens": 30}
    assert await fleet.tokens("decode", tokens, **more) == answer
    os.kill(prefill, signal.SIGCONT)
    await fleet.nothing_left()
    await asyncio.sleep(3.5)  # the gateway has found it again
    before = (await fleet.figures("decode"))["kv_transfer_device_bytes_total:in"]
    fleet.proxy.least = 0  # offers are words
    fleet.proxy.after(900, "hold")
    asked = asyncio.create_task(fleet.tokens("gateway", tokens, cache_salt="killed", max_tokens=30))
    await asyncio.to_thread(fleet.proxy.happened.wait, DEADLINE_S)
    fleet.kill("prefill")
    fleet.proxy.release()
    fleet.proxy.cut()
    assert await asked == answer and fleet.proxy.happened.is_set(), await fleet.why()
    assert (await fleet.figures("decode"))["kv_transfer_device_bytes_total:in"] > before, await fleet.why()
    await fleet.nothing_left("decode")
