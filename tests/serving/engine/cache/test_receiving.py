"""Prefixes that another engine computed: where they land, and that nothing of a transfer that fails is left."""

from __future__ import annotations

import dataclasses
import random

import pytest

from serving.engine.api.types import FinishReason
from serving.engine.requests.cache_specs import PagedSpec, paged
from tests.serving.engine import fake_runner as fake
from tests.serving.engine.cache.test_recurrent import SPEC, hit, prompt
from tests.serving.engine.scheduling.test_scheduler import CONFIG, Driver, request

KINDS = {"pages": paged(None), "windows": paged(None, 16), "hybrid": (PagedSpec(), SPEC), "states": (SPEC,)}


def driver(kind, **changes):
    return Driver(dataclasses.replace(CONFIG, caches=KINDS[kind], num_snapshots=4, num_pages=80, **changes))


def deliver(d, landing, tokens):
    """What a transfer does: writes the pages and the state that another engine has."""
    size = d.scheduler.config.page_size
    for pages in landing.pages:
        for i, page in enumerate(pages):
            if page and i * size >= landing.first:  # what is there already is others' too
                d.device.kv[landing.replica, page] = tokens[i * size : (i + 1) * size]
    if landing.row is not None:
        state = fake.EMPTY
        for token in tokens[: landing.tokens]:
            state = fake.next_state(state, token)
        d.device.snapshots[landing.replica][landing.row] = (landing.tokens, state)


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_what_arrived_is_not_computed(kind, replicas):
    d = driver(kind, replicas=replicas)
    tokens = prompt(60)
    d.add(request("a", tokens))
    landing = d.scheduler.receive("a", 60)
    assert landing.tokens == 56 and [len(pages) for pages in landing.pages] == [7] * len(d.scheduler.config.windows)
    assert not d.step() and not d.scheduler.has_work, "nothing to do meanwhile"
    assert d.scheduler.receive("a", 60) is None, "it is on its way already"
    deliver(d, landing, tokens)
    d.scheduler.arrived("a", landing.tokens)
    d.drain()
    d.verify()
    assert hit(d, "a") == 56


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 7, 24])
def test_what_did_not_arrive_is_computed(kind, tokens):
    d = driver(kind)
    d.add(request("a", prompt(60)))
    d.add(request("b", prompt(20, first=9)))
    landing = d.scheduler.receive("a", 60)
    d.step()  # the other one runs
    deliver(d, landing, prompt(60)[: tokens // 8 * 8] + [-1] * 60)
    d.scheduler.arrived("a", tokens)
    d.drain()
    d.verify()
    # Of a window or a state only the end was sent: nothing of a part is of use.
    assert hit(d, "a") == (tokens // 8 * 8 if kind == "pages" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_ends_while_it_receives_leaves_nothing(kind):
    d = driver(kind)
    for name in ("aborted", "late"):
        d.add(request(name, prompt(60), deadline=5.0 if name == "late" else None))
        assert d.scheduler.receive(name, 60) is not None
    d.abort("aborted")
    d.step(10.0)
    d.drain()
    assert d.finished == {"aborted": FinishReason.ABORT, "late": FinishReason.DEADLINE}
    d.scheduler.arrived("late", 56)  # too late: nobody minds
    assert d.scheduler.pool.num_cached == 0


def test_no_room_is_no_reason_to_wait():
    d = driver("pages")
    d.add(request("a", prompt(60)))
    taken = d.scheduler.kv.managers[0].pool.allocate(75)
    assert d.scheduler.receive("a", 60) is None
    d.scheduler.kv.managers[0].pool.release(taken)
    d.drain()
    d.verify()
    assert d.scheduler.receive("a", 60) is None, "it has ended"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_there_already_is_not_sent(kind):
    d = driver(kind)
    d.add(request("before", prompt(40)))
    d.drain()
    d.add(request("a", prompt(40) + prompt(30, first=9)))
    landing = d.scheduler.receive("a", 69)
    # Of a window, what a longer prefix needs is another end: all of that comes.
    assert landing.first == {"pages": 40, "windows": 40, "hybrid": 40, "states": 64}[kind]
    deliver(d, landing, prompt(40) + prompt(30, first=9))
    d.scheduler.arrived("a", landing.tokens)
    d.drain()
    d.verify()
    assert hit(d, "a") == 64
    d.add(request("again", prompt(40) + prompt(30, first=9)))
    assert d.scheduler.receive("again", 69) is None, "it has all of it"
    d.drain()


def test_one_may_wait_for_what_comes_to_another():
    d = driver("pages")
    for name in ("a", "b"):
        d.add(request(name, prompt(60)))
    landing = d.scheduler.receive("a", 60)
    assert d.scheduler.hold("b") and not d.scheduler.hold("b") and d.scheduler.receiving.count == 2
    deliver(d, landing, prompt(60))
    d.scheduler.arrived("a", landing.tokens)
    d.scheduler.arrived("b", 0)
    d.drain()
    d.verify()
    assert hit(d, "b") == 56 and d.scheduler.receiving.count == 0


def test_what_gives_way_to_a_transfer_goes_to_the_host_first():
    """Pages are written between two steps; what was evicted for them is copied out with the next step otherwise, and would be what
    came instead."""
    d = Driver(dataclasses.replace(CONFIG, caches=KINDS["pages"], num_pages=16, host_pages=40))
    d.add(request("before", prompt(80)))
    d.drain()
    d.add(request("a", prompt(80, first=9)))
    landing = d.scheduler.receive("a", 80)
    spilled = d.scheduler.kv.take_spilled()
    assert spilled and not d.scheduler.kv.take_spilled()
    for replica, page, key in spilled:
        d.device.host[replica, key] = d.device.kv[replica, page].copy()
    deliver(d, landing, prompt(80, first=9))
    d.scheduler.arrived("a", landing.tokens)
    d.drain()
    d.add(request("again", prompt(80)))
    d.drain()
    d.verify()
    assert hit(d, "a") == 72 and hit(d, "again") == 72


def test_pages_that_are_lost_meanwhile_are_computed():
    d = driver("hybrid")
    d.add(request("a", prompt(60)))
    landing = d.scheduler.receive("a", 60)
    d.scheduler.requeue()
    deliver(d, landing, [-1] * 60)
    d.scheduler.arrived("a", 56)
    d.drain()
    d.verify()
    assert hit(d, "a") == 0


@pytest.mark.parametrize("kind", KINDS)
def test_random_transfers(kind):
    """Beside running requests, in a small pool: whole ones, parts, failures, aborts."""
    rng = random.Random(len(kind))
    d = driver(kind, max_num_batched_tokens=32)
    flying = {}
    for i in range(300):
        tokens = prompt(rng.randrange(2, 80), first=rng.randrange(6))
        d.add(request(f"r{i}", tokens, rng.randrange(1, 12)))
        if rng.random() < 0.5 and (landing := d.scheduler.receive(f"r{i}", rng.randrange(1, 90))):
            flying[f"r{i}"] = landing, tokens
        if flying and rng.random() < 0.6:
            name = rng.choice(list(flying))
            landing, tokens = flying.pop(name)
            outcome = rng.random()
            if outcome < 0.2:
                d.abort(name)
            else:
                came = landing.tokens if outcome < 0.7 else rng.randrange(landing.tokens)
                deliver(d, landing, tokens[:came] + [-1] * 90 if came < landing.tokens else tokens)
                d.scheduler.arrived(name, came)
        for _ in range(rng.randrange(3)):
            d.step()
    for name in flying:
        d.scheduler.arrived(name, 0)
    d.drain()
    d.verify()
    assert len(d.finished) == 300 and d.scheduler.counters.prefix_hits > 1000
