"""How many decode steps a dispatch holds by default: several where nobody looks at any request before it has ended."""

from __future__ import annotations

import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from serving.engine.scheduling.lengths import MOST_S, MOST_STEPS
from tests.serving.engine import fake_runner as fake
from tests.serving.engine.scheduling.test_scheduler import CONFIG, DRAFTS, Driver, request

STEP_S = 0.01


def driver(step_s: float = STEP_S, **changed) -> Driver:
    """One whose steps take so long; rows cost nothing."""
    d = Driver(dataclasses.replace(CONFIG, **changed))
    observe = type(d.scheduler).observe
    d.scheduler.observe = lambda plan, _, *more: observe(d.scheduler, plan, step_s * plan.num_steps, *more)
    return d


def whole(name: str, max_tokens: int = 40, **kw) -> EngineRequest:
    return request(name, [ord(name[0])] * 3, max_tokens, whole=True, **kw)


def lengths(d: Driver) -> list[int]:
    """Steps of the dispatches that had decode rows alone."""
    d.drain()
    d.verify()
    return [plan.num_steps for plan in d.plans if not plan.chunks]


def test_long_dispatches_and_single_steps_take_turns():
    d = driver()
    d.add(whole("a"))
    d.add(whole("b"))
    found = lengths(d)
    assert found[:6] == [1, 1, 8, 1, 8, 1]  # the first tells what a step takes, while the second runs
    assert sum(found) == 39


@pytest.mark.parametrize(("step_s", "most"), [(MOST_S / 2, 2), (MOST_S / 3.5, 3), (MOST_S, 1), (1.0, 1)])
def test_a_dispatch_takes_no_longer_than_its_bound(step_s, most):
    d = driver(step_s)
    d.add(whole("a"))
    assert max(lengths(d)) == most


def test_a_dispatch_ends_with_the_shortest_completion():
    d = driver()
    d.add(whole("a", 40))
    d.add(whole("b", 6))
    found = lengths(d)
    assert found[:4] == [1, 1, 3, 1] and max(found) == MOST_STEPS  # the prompt's step has given b's first token


def test_where_somebody_listens_there_are_single_steps_until_that_one_has_ended():
    d = driver()
    d.add(whole("a", 60))
    d.add(request("heard", [1, 2, 3], 30))
    found = lengths(d)
    assert set(found[:29]) == {1} and max(found) == MOST_STEPS


@pytest.mark.parametrize(
    "spec", [{"params": {"logprobs": 1}}, {"params": {"allowed_token_ids": tuple(range(fake.VOCAB))}}, {"adapter": "x"}]
)
def test_what_the_host_has_a_part_in_is_not_lengthened(spec):
    d = driver(adapter_slots=1)
    d.scheduler.add(whole("a", 20, **spec))
    (candidate,) = d.scheduler.requests.values()
    d.scheduler.lengths.step_s = STEP_S
    candidate.adapter_slot = int("adapter" in spec)
    assert d.scheduler.lengths.choose([candidate], False, 0) == 1


@pytest.mark.parametrize(
    "changed", [{"policy": "priority"}, {"speculative_config": DRAFTS}, {"num_scheduler_steps": 1}]
)
def test_what_does_not_go_with_it_has_single_steps(changed):
    d = driver(**changed)
    d.add(whole("a"))
    assert set(lengths(d)) == {1}


def test_a_given_number_holds_whoever_listens():
    d = driver(num_scheduler_steps=4)
    d.add(request("a", [1, 2, 3], 30))
    assert 4 in lengths(d)


def test_a_newcomer_waits_for_no_second_long_dispatch():
    d = driver()
    d.add(whole("a", 60))
    while not d.plans or d.plans[-1].num_steps == 1:
        d.step()
    d.add(request("late", [7, 8, 9], 5))
    d.step()
    assert d.plans[-1].chunks, "the step behind the long one is the newcomer's"
    d.drain()
    d.verify()


def test_nobody_is_lengthened_while_another_waits_for_a_slot():
    d = driver(max_num_seqs=1)
    d.add(whole("a", 30))
    d.add(whole("b", 30))
    d.drain()
    d.verify()
    assert {p.num_steps for p in d.plans if p.decode and p.decode[0].request_id == "a"} == {1}
    assert MOST_STEPS in {p.num_steps for p in d.plans if p.decode and p.decode[0].request_id == "b"}


def test_without_pages_for_all_steps_there_is_one():
    d = driver(num_pages=6, enable_prefix_caching=False)
    d.add(whole("a", 37))
    found = lengths(d)
    assert sum(found) == 36


def test_tokens_come_with_the_first_output_and_the_last():
    d = driver()
    outputs = []
    take = d._take
    d.pipeline._emit = lambda new: (outputs.extend(new), take(new))
    d.add(whole("a", 30))
    d.drain()
    d.verify()
    assert [len(o.token_ids) for o in outputs] == [1, 29]
    assert (
        outputs[1].finish_reason is FinishReason.LENGTH and outputs[1].times.first_token == outputs[0].times.first_token
    )


def test_an_end_of_sequence_within_a_dispatch_drops_what_follows():
    prompt = [5, 6, 7]
    true = fake.expected(prompt, 12)
    stop = true[6]
    d = driver()
    d.add(EngineRequest("a", tuple(prompt), SamplingParams(temperature=0, max_tokens=50), (stop,), whole=True))
    d.add(whole("b", 60))
    d.drain()
    d.verify()
    assert d.tokens["a"] == true[: true.index(stop) + 1] and d.finished["a"] is FinishReason.STOP
    assert len(d.tokens["b"]) == 60


def test_an_abort_tells_what_there_was():
    d = driver()
    d.add(whole("a", 60))
    for _ in range(6):
        d.step()
    d.abort("a")
    assert d.finished == {"a": FinishReason.ABORT} and len(d.tokens["a"]) > 8
    d.drain()
    d.verify()
