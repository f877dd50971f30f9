"""Steps that give some tokens a request: as many as were planned at most, or fewer."""

from __future__ import annotations

import dataclasses

import numpy as np

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, FinishReason
from serving.engine.requests.plan import StepPlan, StepResult
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.scheduler import Scheduler


def scheduler() -> Scheduler:
    return Scheduler(SchedulerConfig(4, 64, 64, 4, 64, 16, 40))


def with_drafts(plan: StepPlan, drafts: tuple[tuple[int, ...], ...]) -> StepPlan:
    """The plan with drafts behind its decode rows, the requests advanced as far as they may come."""
    for request, guessed in zip(plan.decode, drafts, strict=True):
        request.num_computed += len(guessed)
        request.num_pending += len(guessed)
    return dataclasses.replace(plan, drafts=drafts)


def result(*rows: tuple[int, ...]) -> StepResult:
    tokens = np.full((len(rows), max(map(len, rows))), -1, np.int32)
    for row, found in enumerate(rows):
        tokens[row, : len(found)] = found
    return StepResult(tokens, np.ones(tokens.shape, bool))


def start(s: Scheduler, **params) -> None:
    for name in "ab":
        s.add(EngineRequest(name, (1, 2, 3), SamplingParams(max_tokens=8, **params), eos_token_ids=(9,)))
    plan = s.schedule(0.0)
    assert plan is not None
    s.retire(plan, result((10,), (20,)), 0.0)


def test_rows_take_what_they_get():
    s = scheduler()
    start(s)
    plan = s.schedule(0.0)
    assert plan is not None
    plan = with_drafts(plan, ((11, 12), (21, 22)))
    outputs = s.retire(plan, result((11, 12, 13), (25,)), 0.0)
    assert [(o.request_id, o.token_ids) for o in outputs] == [("a", (11,)), ("a", (12,)), ("a", (13,)), ("b", (25,))]
    a, b = s.requests["a"], s.requests["b"]
    assert a.tokens[3:] == [10, 11, 12, 13] and b.tokens[3:] == [20, 25]
    for request in (a, b):  # each has its last token left to compute
        assert (request.num_pending, request.num_uncomputed) == (0, 1)
    following = s.schedule(0.0)
    assert following is not None and following.decode_positions == (6, 4)


def test_a_request_ends_amid_its_tokens():
    s = scheduler()
    start(s)
    plan = s.schedule(0.0)
    assert plan is not None
    outputs = s.retire(with_drafts(plan, ((9, 12), (21,))), result((9, 12, 13), (21, 22)), 0.0)
    assert [(o.request_id, o.token_ids, o.finish_reason) for o in outputs] == [
        ("a", (9,), FinishReason.STOP),
        ("b", (21,), None),
        ("b", (22,), None),
    ]
    assert "a" not in s.requests and s.requests["b"].num_uncomputed == 1


def test_a_preempted_request_waits_for_what_it_may_get():
    s = scheduler()
    start(s)
    plan = s.schedule(0.0)
    assert plan is not None
    plan = with_drafts(plan, ((11, 12), (21, 22)))
    s._preempt(s.requests["b"])
    s.retire(plan, result((11,), (21, 25)), 0.0)
    b = s.requests["b"]
    assert (b.tokens[3:], b.num_pending, b.num_computed) == ([20, 21, 25], 0, 0)
