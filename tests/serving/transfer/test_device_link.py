"""Pages from device to device: when that is chosen, what becomes of offers, and engines whose pages go that way."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from serving.engine.api.peers.transfers import DeviceWay, Offer, Parcel, TransferError
from serving.engine.device.stores.page_store import PARCEL, Lent, _Parcel
from serving.transfer import device_link
from serving.transfer.config import TransferConfig
from serving.transfer.device_link import DeviceLink, Pulling, is_chosen, link_of, listening
from serving.transfer.forms import Form
from tests.serving.engine.test_engine import alone, run
from tests.serving.transfer import local
from tests.serving.transfer.offering import Offering
from tests.serving.transfer.test_two_engines import (
    SIZES,
    WAYS,
    P,
    _falls_back,
    apart,
    each_apart,
    halves,
    mixed,
    nothing_left,
    prompt,
    request,
    told,
)  # fmt: skip
from tests.tiny import tiny_engine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="jax has transfer servers on Linux")

ROW = (1 << 20,)
"""Of the arrays that are offered by a process of its own: 4 MB a page, 64 MB an offer."""


@pytest.mark.parametrize(
    ("transport", "platform", "tls", "chosen"),
    [
        ("grpc", "gpu", False, False),
        ("auto", "gpu", False, True),
        ("auto", "tpu", False, True),
        ("auto", "cpu", False, False),
        ("auto", "gpu", True, False),
        ("device", "cpu", False, True),
    ],
)
def test_when_it_is_chosen(transport, platform, tls, chosen):
    assert is_chosen(TransferConfig("both", transport=transport, tls=tls), platform) is chosen


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({}, "127.0.0.1"),
        ({"host": "127.0.0.2"}, "127.0.0.2"),
        ({"host": "[::1]"}, "::1"),
        ({"peers": ("127.0.0.0/8", "::1")}, "127.0.0.1"),
    ],
)
def test_where_it_listens(fields, address):
    assert listening(TransferConfig("both", **fields)) == address


def test_an_address_that_is_not_here():
    """Whoever asks for it is told; elsewhere pages go over gRPC."""
    arrays = [jax.device_put(np.zeros((2, 3), np.float32))]
    elsewhere = TransferConfig("both", transport="device", host="192.0.2.1")
    with pytest.raises(ValueError, match="no transfer server starts"):
        link_of(elsewhere, [Form((3,), np.float32)], arrays)
    assert link_of(dataclasses.replace(elsewhere, transport="auto"), [Form((3,), np.float32)], arrays) is None


def test_pages_that_are_cut_are_not_offered():
    """Two devices with a head each; and a replica's page that lies on one."""
    half, whole = np.zeros((PARCEL, 1, 4)), np.zeros((PARCEL, 2, 4))
    left, right, both = (((0, 1), (0, 4)), ((1, 2), (0, 4)), ((0, 2), (0, 4)))
    cut = _Parcel({(0, b"k"): 0}, [{(0, left): half, (0, right): half}])
    kept = _Parcel({(1, b"k"): 0}, [{(0, both): half, (1, both): whole}])
    assert Lent([cut], [(0, b"k")], [(2, 4)]).on_device is None
    found = Lent([kept], [(1, b"k")], [(2, 4)]).on_device
    assert found is not None and found[0] is whole
    assert Lent([kept, kept], [(1, b"k")], [(2, 4)]).on_device is None


@pytest.fixture(scope="module")
def link():
    return DeviceLink([Form(ROW, np.dtype(np.float32))], jax.devices()[0], "127.0.0.1", 5.0)


def test_copies_that_wait_are_bounded(monkeypatch):
    one = DeviceLink([Form((4,), np.dtype(np.int8))], jax.devices()[0], "127.0.0.1", 60.0)
    monkeypatch.setattr(device_link, "MOST_OFFERED", 2 * PARCEL * 4)
    arrays = [jax.device_put(np.zeros((PARCEL, 4), np.int8), jax.devices()[0])]
    first, _ = one.offer(arrays), one.offer(arrays)
    assert first is not None and not one.has_room(0.0)
    one.pulled(first.number)
    assert one.has_room(0.0) and one.waiting == 1


@pytest.fixture
def offering():
    made = Offering([(ROW, "float32")])
    yield made
    made.close()


def within(seconds):
    """A reason not to wait any longer, after so long."""
    end = time.monotonic() + seconds
    return lambda: "too_slow" if time.monotonic() > end else ""


def test_offers_of_another_process(link, offering):
    """One that is pulled, those that nobody pulls, those of a process that is frozen, and of one that dies."""
    offer = offering.offer(7)
    (came,) = link.pull("peer", offer, within(60))
    assert came.shape == (PARCEL, *ROW) and (came == 7).all()
    del came
    assert offering.ask("waiting") == 1 and offering.ask(f"pulled {offer.number}") == 0
    before = offering.ask("memory")
    late = [offering.offer(i, 0.5) for i in range(4)]  # 256 MB
    for _ in range(300):
        if not offering.ask("waiting") and offering.ask("memory") < before + 100e6:
            break
        time.sleep(0.1)
    assert not offering.ask("waiting") and offering.ask("memory") < before + 100e6, "given up"
    with pytest.raises(TransferError) as caught:
        link.pull("late", late[0], within(0.3))
    assert caught.value.reason == "too_slow" and link.way_to("late") is None and link.way_to("other") == link.way
    offer = offering.offer(8)
    os.kill(offering.popen.pid, signal.SIGSTOP)
    with pytest.raises(TransferError, match="too_slow"):
        link.pull("peer", offer, within(0.3))
    os.kill(offering.popen.pid, signal.SIGCONT)
    offer = Offer(offering.address, 5, 0, 1)  # never comes
    threading.Timer(0.3, offering.popen.kill).start()
    with pytest.raises(TransferError) as caught:
        link.pull("peer", offer, within(30))
    assert caught.value.reason == "not_pulled"
    with pytest.raises(TransferError) as caught:
        link.pull("peer", offer, within(30))
    assert caught.value.reason == "not_pulled", "nobody is there"


def test_what_was_not_asked_for(link):
    for one, offer in ((None, Offer("127.0.0.1:1", 1, 0, 1)), (link, Offer("127.0.0.1:1", 1, PARCEL, 1))):
        with pytest.raises(TransferError, match="not asked for"):
            Pulling(one, "peer", str, print).brought(Parcel(0, b"", b"", offer))


@pytest.fixture(scope="module")
def pair():
    """As in test_two_engines.py, with links."""
    transport = local.LocalTransport()
    ways = dataclasses.replace(WAYS, transport="device", host="127.0.0.1", stall_s=2.5)
    first = tiny_engine(transfers=dataclasses.replace(ways, role="prefill"), **SIZES)
    second = tiny_engine(transfers=dataclasses.replace(ways, role="decode"), transport=transport, **SIZES)
    first.page_source._link._lease_s = 5.0  # what nobody pulls is waited for, below
    yield first, second, transport
    for engine in (first, second):
        engine.shutdown()
        engine.runner.guard.check()


@pytest.fixture
def clean(pair):
    """Nothing cached, nothing broken, nobody doubted; and nothing left afterwards that could be pulled."""
    first, second, transport = pair
    for engine in (first, second):
        engine.call(engine.scheduler.kv.forget)
    transport.engines, transport.before = {P: first}, lambda parcel: parcel
    taken = second.loop.peers.taking._link
    taken._doubted.clear()
    yield taken
    for _ in range(200):
        if not first.page_source._link.waiting:
            break
        time.sleep(0.05)
    assert not first.page_source._link.waiting


async def test_engines(pair, clean):
    """The tokens of one engine; whole parcels come from the device, single pages do not."""
    first, second, _ = pair
    whole = request("a", prompt(150))
    before = told(second)
    await run(first, halves(whole, "t")[0])
    found = await run(second, halves(whole, "t")[1])
    assert found.num_cached_tokens == 144
    page = 3 * 2 * 8 * 2 * 16 * 4  # 3 layers, K and V, 8 tokens, 2 heads of 16, float32
    assert told(second).bytes_in - before.bytes_in == 18 * page
    assert told(second).device_bytes_in - before.device_bytes_in == 16 * page == told(first).device_bytes_out
    second.call(second.scheduler.kv.forget)
    expected = await run(second, dataclasses.replace(whole, request_id="expected"))
    assert found.token_ids == expected.token_ids
    await nothing_left(pair)


async def test_many_at_once(pair, clean):
    _, second, _ = pair
    whole = mixed(9)
    expected = await alone(second, [one for one, _ in mixed(9)])
    for engine in pair[:2]:
        engine.call(engine.scheduler.kv.forget)
    before = told(second).device_bytes_in
    found = await each_apart(pair, whole, False)
    assert {r.request_id: f.token_ids for (r, _), f in zip(whole, found, strict=True)} == {
        name: one.token_ids for name, one in expected.items()
    }
    assert told(second).device_bytes_in > before
    await nothing_left(pair)


async def test_who_pulls_in_another_way_is_sent_them(pair, clean):
    own, clean.way = clean.way, DeviceWay("tpu", "another")
    before = told(pair[1]).device_bytes_in
    try:
        found = await apart(pair, request("a", prompt(150)), True)
    finally:
        clean.way = own
    assert found.num_cached_tokens == 144 and told(pair[1]).device_bytes_in == before
    await nothing_left(pair)


async def test_what_is_pulled_is_verified(pair, clean, monkeypatch):
    pull = clean.pull

    def spoilt(*args):
        arrays = [array.copy() for array in pull(*args)]
        arrays[2][3] += 1
        return arrays

    monkeypatch.setattr(clean, "pull", spoilt)
    found = await _falls_back(pair, request("a", prompt(150)), "wrong_digest")
    assert found.num_cached_tokens == 24, "what was verified by then is used"


@pytest.mark.parametrize(("what", "reason"), [("frozen", "too_slow"), ("killed", "not_pulled")])
async def test_a_process_that_ends_between_offer_and_pull(pair, clean, monkeypatch, what, reason):
    """Offers of another process, which then says nothing: its pages are computed in time, and asked for over gRPC from then on."""
    first, second, transport = pair
    monkeypatch.setattr(first.page_source._link, "_lease_s", 0.5)  # nobody pulls its own offers
    arrays = second.runner.executor.page_arrays
    away = Offering([(a.shape[1:], str(a.dtype)) for a in arrays])
    theirs = away.offer()
    os.kill(away.popen.pid, signal.SIGSTOP)

    def elsewhere(parcel):
        if parcel is None or parcel.offer is None:
            return parcel
        if what == "killed" and not parcel.offer.first:
            threading.Timer(0.3, away.popen.kill).start()
        return dataclasses.replace(
            parcel, offer=dataclasses.replace(parcel.offer, address=theirs.address, number=theirs.number)
        )

    try:
        transport.before = elsewhere
        began = time.monotonic()
        found = await asyncio.wait_for(_falls_back(pair, request("a", prompt(150)), reason), 30)
        assert found.num_cached_tokens == 0 and time.monotonic() - began < 30
        transport.before = lambda parcel: parcel
        second.call(second.scheduler.kv.forget)
        before = told(second).device_bytes_in
        found = await apart(pair, request("b", prompt(150)), True)
        assert found.num_cached_tokens == 144 and told(second).device_bytes_in == before
    finally:
        away.close()
    await nothing_left(pair)
