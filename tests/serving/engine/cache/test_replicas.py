"""One scheduler over several replicas: where requests go, and that nothing of one replica is taken for another's."""

from __future__ import annotations

import random

import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from serving.engine.requests.cache_specs import paged
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.requests.slots import SlotTable
from tests.serving.engine.fake_runner import VOCAB, expected
from tests.serving.engine.scheduling.test_scheduler import Driver


def config(**changes):
    sizes = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "max_chunk_tokens": 64, "max_chunk_rows": 4}
    sizes |= {"max_model_len": 96, "page_size": 8, "num_pages": 24, "replicas": 3}
    return SchedulerConfig(**(sizes | changes))


def spec(name, prompt, tokens=8):
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return EngineRequest(name, tuple(prompt), params)


class Run(Driver):
    """Notes where requests go."""

    def __init__(self, **changes):
        super().__init__(config(**changes))
        self.placed: dict[str, int] = {}

    def add(self, name, prompt, tokens=8):
        super().add(spec(name, prompt, tokens))

    def step(self, now=0.0):
        before = len(self.plans)
        super().step(now)
        for plan in self.plans[before:]:
            self.placed |= {r.request_id: r.replica for r in plan.admitted}
            parts = [plan.of_replica(replica) for replica in range(self.scheduler.config.replicas)]
            assert sum(len(p.decode) + len(p.chunks) for p in parts) == len(plan.decode) + len(plan.chunks)
            assert all(set(p.sampled) <= set(p.requests) for p in parts)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("policy", "windows"), [("fcfs", (None,)), ("priority", (None,)), ("fcfs", (None, 16))])
def test_random_walk(replicas, steps, policy, windows):
    """Every completion is what its own sequence calls for, through preemptions, aborts, shared prefixes and long prompts."""
    rng = random.Random(replicas * 7 + steps)
    run = Run(
        replicas=replicas,
        num_pages=12 + 4 * len(windows),
        num_scheduler_steps=steps,
        policy=policy,
        caches=paged(*windows),
    )
    prefixes = [[rng.randrange(VOCAB) for _ in range(20)] for _ in range(3)]
    prompts, alive = {}, []
    for number in range(150):
        name = f"r{number}"
        tail = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        prompts[name] = rng.choice([[], *prefixes]) + tail
        run.add(name, prompts[name], rng.randrange(1, 30))
        alive.append(name)
        for _ in range(rng.randrange(4)):
            run.step()
        if rng.random() < 0.1:
            victim = alive.pop(rng.randrange(len(alive)))
            run.abort(victim)
    run.drain()
    assert run.scheduler.counters.preemptions > 0, "the pools are small enough to need it"
    assert run.scheduler.counters.prefix_hits > 0
    assert set(run.placed.values()) == set(range(replicas))
    for name, tokens in run.tokens.items():
        assert tokens == expected(prompts[name], len(tokens)), name
        if run.finished[name] is not FinishReason.ABORT:
            assert run.finished[name] is FinishReason.LENGTH


def test_newcomers_spread():
    run = Run()
    for number in range(6):
        run.add(f"r{number}", [number] * 9)
    run.step()
    assert sorted(run.placed.values()) == [0, 0, 1, 1, 2, 2]
    run.drain()


def test_a_prefix_is_followed_unless_its_replica_is_much_fuller():
    run = Run()
    shared = list(range(33))
    run.add("first", shared)
    run.drain()
    home = run.placed["first"]
    run.add("second", [*shared, 1], 40)
    run.step()
    assert run.placed["second"] == home, "32 tokens need not be computed there"
    run.add("third", [*shared, 2], 40)
    run.step()
    assert run.placed["third"] != home, "a row more of every step is worse than computing 32 tokens"
    run.drain()


def test_a_full_replica_is_no_reason_to_wait():
    run = Run(max_num_seqs=1)
    shared = list(range(60))
    run.add("first", shared, 30)
    run.step()
    run.step()
    run.add("second", [*shared, 1], 2)
    run.step()
    assert run.placed["second"] != run.placed["first"]
    run.drain()


def test_no_replica_has_room():
    run = Run(max_num_seqs=1)
    for number in range(4):
        run.add(f"r{number}", [number] * 9, 20)
    run.step()
    assert len(run.placed) == 3 and len(run.scheduler.waiting) == 1
    run.drain()
    assert all(len(tokens) == 20 for tokens in run.tokens.values())


def test_slots_count_within_their_replica_on_the_device():
    slots = SlotTable(2, 4, replicas=3)
    requests = [Request(spec(str(i), [1]), i) for i in range(4)]
    for request, replica in zip(requests, (0, 1, 1, 2), strict=True):
        request.replica = replica
        slots.acquire(request)
    assert [r.slot for r in requests] == [0, 2, 3, 4]
    assert [slots.free_in(replica) for replica in range(3)] == [1, 0, 1] and slots.num_free == 2
    rows = np.array([r.slot for r in requests] + [slots.num_slots])
    assert slots.on_device(rows).tolist() == [0, 0, 1, 0, 2], "each replica's dummy is behind its own slots"
    slots.release(requests[1])
    assert slots.free_in(1) == 1
