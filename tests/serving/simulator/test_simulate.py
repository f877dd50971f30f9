"""The virtual clock, and the real scheduler under it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import pytest

from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.requests.buckets import BucketTable
from serving.engine.scheduling.scheduler import SchedulerConfig
from serving.simulator.cost import CostModel
from serving.simulator.report import Report
from serving.simulator.simulate import Outcome, Simulation
from serving.simulator.trace import GENERATORS, TraceRequest

TABLE = BucketTable.make(8, 256)
COST = CostModel((5e-3, 0.0, 1e-3, 1e-4, 1e-4, 0.0, 0.0, 1e-7, 0.0), 8, 256)
CONFIG = SchedulerConfig(8, 256, TABLE.max_chunk, TABLE.max_rows, 4096, 16, 600)


def run(
    trace: Iterable[TraceRequest], config: SchedulerConfig = CONFIG, **more: object
) -> tuple[list[Outcome], Simulation]:
    simulation = Simulation(config, COST, **more)  # pyright: ignore[reportArgumentType]
    return list(simulation.run(trace)), simulation


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_everything_finishes_and_every_page_comes_back(name: str, asynchronous: bool) -> None:
    trace = list(itertools.islice(GENERATORS[name](4.0, 0), 150))
    outcomes, simulation = run(trace, asynchronous=asynchronous)
    assert len(outcomes) == 150
    assert {o.reason for o in outcomes} == {"length"}
    assert sorted(o.output_tokens for o in outcomes) == sorted(r.output_tokens for r in trace)
    for o in outcomes:
        assert 0 < o.ttft <= o.e2e
        assert o.cached_tokens < o.prompt_tokens
    simulation.scheduler.pool.check()
    assert simulation.scheduler.pool.num_free == CONFIG.num_pages - 1
    assert not simulation.scheduler.has_work
    assert 0 < simulation.totals.busy <= simulation.totals.seconds * (1 + 1e-9)


def test_one_request_takes_what_its_steps_cost() -> None:
    outcomes, _ = run([TraceRequest(1.0, 16, 4)], asynchronous=False)
    prefill = 5e-3 + 1e-3 + 64e-4  # 16 tokens are padded to a chunk of 64
    decode = [5e-3 + 1e-4 + 1e-7 * context for context in (17, 18, 19)]
    assert outcomes[0].ttft == pytest.approx(prefill)
    assert outcomes[0].e2e == pytest.approx(prefill + sum(decode))
    assert outcomes[0].worst_gap == pytest.approx(max(decode))


def test_asynchronous_stepping_hides_host_work() -> None:
    trace = list(itertools.islice(GENERATORS["short"](50.0, 0), 100))
    seconds = {}
    for asynchronous in (True, False):
        simulation = Simulation(CONFIG, dataclasses.replace(COST, host_s=2e-3), asynchronous=asynchronous)
        list(simulation.run(trace))
        seconds[asynchronous] = simulation.totals.seconds
        if asynchronous:
            assert simulation.totals.busy / simulation.totals.seconds > 0.95
    assert seconds[True] < 0.85 * seconds[False]


def test_priority_keeps_urgent_requests_fast_at_twice_the_load() -> None:
    def ttft_p95(policy: str, rate: float) -> list[float]:
        report = Report()
        for outcome in run(
            itertools.islice(GENERATORS["overload"](rate, 0), 600), dataclasses.replace(CONFIG, policy=policy)
        )[0]:
            report.add(outcome)
        assert report.groups == ["priority 0", "priority 1"]
        return [report.percentiles("ttft", group)["p95"] for group in report.groups]

    # The batch of 8 serves 15 of these requests a second.
    fcfs, priority = ttft_p95("fcfs", 30), ttft_p95("priority", 30)
    assert priority[0] < fcfs[0] / 20
    assert priority[0] < priority[1] / 20


def test_fair_share_protects_the_light_tenant() -> None:
    p95 = {}
    for fair in (False, True):
        report = Report()
        config = dataclasses.replace(CONFIG, fair_share=fair)
        for outcome in run(itertools.islice(GENERATORS["crowd"](30, 0), 500), config)[0]:
            report.add(outcome)
        assert report.groups == ["heavy, priority 0", "light, priority 0"]
        p95[fair] = report.percentiles("ttft", "light, priority 0")["p95"]
    assert p95[True] < p95[False] / 10


def test_a_shared_prefix_is_computed_once() -> None:
    trace = [TraceRequest(0.5 * i, 1000, 8, prefix=((1, 960),)) for i in range(20)]
    outcomes, sharing = run(trace)
    _, alone = run(trace, dataclasses.replace(CONFIG, enable_prefix_caching=False))
    assert [o.cached_tokens for o in outcomes] == [0] + [960] * 19
    assert sharing.totals.computed_tokens == alone.totals.computed_tokens - 19 * 960


def test_the_next_turn_finds_its_history() -> None:
    first = TraceRequest(0.0, 100, 60, prefix=((1, 100),), output_id=2)
    second = TraceRequest(30.0, 200, 5, prefix=((1, 100), (2, 60), (3, 40)), output_id=4)
    outcomes, _ = run([first, second])
    # The last completion token's KV is never computed, and only full pages are shared: 159 -> 144.
    assert outcomes[1].cached_tokens == 144


def test_pressure_preempts_and_loses_nothing() -> None:
    tight = dataclasses.replace(CONFIG, num_pages=60)
    outcomes, simulation = run([TraceRequest(0.0, 64, 200) for _ in range(8)], tight)
    assert simulation.totals.preemptions > 0
    assert [o.output_tokens for o in outcomes] == [200] * 8
    assert simulation.scheduler.pool.num_free == 59


def test_deadlines_and_full_queues_end_requests_with_their_reason() -> None:
    trace = [TraceRequest(0.0, 100, 400, deadline=0.5)] + [TraceRequest(0.001 * i, 100, 400) for i in range(30)]
    outcomes, simulation = run(trace, max_num_queued_reqs=4)
    reasons = [o.reason for o in outcomes]
    assert reasons.count("deadline") == 1
    assert reasons.count("refused") == simulation.totals.refused > 0
    assert reasons.count("length") == 31 - 1 - simulation.totals.refused


def test_two_replicas_serve_twice_the_load() -> None:
    trace = list(itertools.islice(GENERATORS["short"](80.0, 0), 300))
    seconds = {}
    for replicas in (1, 2):
        outcomes, simulation = run(trace, dataclasses.replace(CONFIG, replicas=replicas))
        assert {o.reason for o in outcomes} == {"length"}
        assert simulation.scheduler.pool.num_free == replicas * (CONFIG.num_pages - 1)
        seconds[replicas] = simulation.totals.seconds
    assert 0.4 < seconds[2] / seconds[1] < 0.7


def test_report_adds_up() -> None:
    report = Report()
    outcomes, simulation = run(itertools.islice(GENERATORS["overload"](4.0, 1), 100))
    for o in outcomes:
        report.add(o)
    summary = report.summary(simulation.totals)
    assert summary["requests"] == 100 and summary["reasons"] == {"length": 100}
    assert report.output_tokens == sum(o.output_tokens for o in outcomes)
    assert len(report.values("ttft")) == sum(len(report.values("ttft", g)) for g in report.groups) == 100
    assert 0 <= summary["kv_waste"] < summary["kv_waste_contiguous"] < 1  # pyright: ignore[reportOperatorIssue]


def test_drafts_are_right_as_often_as_one_says() -> None:
    """And are left alone where they pay nothing."""
    cost = dataclasses.replace(COST, draft_tokens=3)
    how = SpeculativeConfig("ngram", num_speculative_tokens=3)
    config = dataclasses.replace(CONFIG, speculative_config=how, buckets=cost.buckets, step_seconds=cost.decode_steps())
    steps = {}
    for acceptance in (0.0, 0.5, 1.0):
        simulation = Simulation(config, cost, acceptance=acceptance)
        (outcome,) = simulation.run([TraceRequest(1.0, 16, 401)])
        assert outcome.output_tokens == 401
        steps[acceptance] = simulation.totals.steps - 1
    assert steps[1.0] == 100 and steps[0.0] == 400
    assert steps[0.5] == pytest.approx(400 / (1 + 0.5 + 0.25 + 0.125), rel=0.15)
