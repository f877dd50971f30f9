"""Routing policies compared on a virtual clock: the real scheduler and the real router, the same every time."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib

import pytest

from serving.engine.requests.buckets import BucketTable
from serving.engine.scheduling.scheduler import SchedulerConfig
from serving.routing.policies import Balance
from serving.routing.router import Router
from serving.simulator import cost as cost_model
from serving.simulator.apart import Link
from serving.simulator.cluster import Cluster
from serving.simulator.cost import CostModel
from serving.simulator.report import Report
from serving.simulator.sharing import Sharing
from serving.simulator.simulate import Simulation
from serving.simulator.trace import GENERATORS, Lengths, TraceRequest, multi_turn

COST = CostModel.load(pathlib.Path(cost_model.__file__).parent / "cpu_cost.json")
TABLE = BucketTable.make(COST.max_num_seqs, COST.max_num_batched_tokens)


def config_of(num_pages: int = 700) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=COST.max_num_seqs,
        max_num_batched_tokens=COST.max_num_batched_tokens,
        max_model_len=4096,
        page_size=16,
        num_pages=num_pages,
        max_chunk_tokens=TABLE.max_chunk,
        max_chunk_rows=TABLE.max_rows,
        buckets=TABLE,
    )


def conversations(count: int, rate: float = 0.6) -> list[TraceRequest]:
    """Agents: few system prompts, several turns, short answers."""
    source = multi_turn(
        rate, 5, turns=5, think_s=4.0, systems=6, system_tokens=512, max_tokens=3000,
        message=Lengths(100, 0.5, 16, 300), output=Lengths(24, 0.4, 8, 64),
    )  # fmt: skip
    return list(itertools.islice(source, count))


def run(policy: str, trace: list[TraceRequest], engines: int = 4, **more) -> tuple[Report, Cluster]:
    cluster = Cluster(config_of(), COST, engines, Router(policy, more.pop("balance", None)), **more)
    report = Report()
    for outcome in cluster.run(trace):
        report.add(outcome)
    return report, cluster


def test_one_engine_behind_a_router_is_that_engine():
    trace = conversations(60)
    alone = sorted(Simulation(config_of(), COST).run(iter(trace)), key=lambda o: (o.arrival, o.prompt_tokens))
    cluster = Cluster(config_of(), COST, 1, Router("cache"))
    behind = sorted(cluster.run(iter(trace)), key=lambda o: (o.arrival, o.prompt_tokens))
    assert behind == alone
    assert cluster.router.decisions == {("cache", "only"): 60}


def test_the_cache_policy_halves_what_is_computed_and_stays_balanced():
    trace = conversations(240)
    computed, ttft, worst = {}, {}, {}
    for policy in ("round-robin", "least-loaded", "cache"):
        report, cluster = run(policy, trace, balance=Balance(abs_threshold=4))
        assert report.requests == 240 and set(report.reasons) == {"length"}
        assert all(target.live == 0 for target in cluster.targets)
        computed[policy] = report.prompt_tokens - report.cached_tokens
        ttft[policy] = report.percentiles("ttft")["p50"]
        worst[policy] = cluster.totals.worst_imbalance
        if policy == "cache":
            counts = [target.routed for target in cluster.targets]
            assert cluster.router.matched_tokens > 0.5 * cluster.router.prompt_tokens
            # What it believes to be cached mostly is.
            assert report.cached_tokens > 0.9 * cluster.router.matched_tokens - 16 * 240
    assert 2 * computed["cache"] <= computed["round-robin"], computed
    assert computed["cache"] < computed["least-loaded"]
    assert ttft["cache"] < 0.7 * ttft["round-robin"], ttft
    assert max(counts) < 2 * min(counts), counts
    assert worst["cache"] <= max(4 + 1, 1.5 * 8), worst


def by_arrival(outcomes) -> list[tuple]:
    """What became of each request, rounded to a nanosecond."""
    rows = [dataclasses.astuple(one) for one in sorted(outcomes, key=lambda o: (o.arrival, o.prompt_tokens))]
    return [tuple(round(v, 9) if isinstance(v, float) else v for v in row) for row in rows]


def test_steps_that_are_scheduled_as_one_change_nothing():
    """Behind a router too, whose decisions hang on what the engines have done by then."""
    trace = conversations(150, rate=0.9)
    each = [Simulation(config_of(4000), COST, coalesce=coalesce) for coalesce in (False, True)]
    assert by_arrival(each[0].run(iter(trace))) == by_arrival(each[1].run(iter(trace)))
    assert each[0].totals.steps == each[1].totals.steps
    assert each[0].totals.kv_used == pytest.approx(each[1].totals.kv_used, rel=0.05)
    clusters = [Cluster(config_of(4000), COST, 3, Router("cache")) for _ in range(2)]
    for engine in clusters[0].engines:
        engine.coalesce = False
    assert by_arrival(clusters[0].run(trace)) == by_arrival(clusters[1].run(trace))
    assert clusters[0].router.decisions == clusters[1].router.decisions
    assert clusters[0].totals.worst_imbalance == clusters[1].totals.worst_imbalance


def test_prompts_computed_elsewhere_hold_no_stream_up():
    """Streams all the time, and a long prompt now and then: of three engines one that computes prompts for the others, or none."""
    streams = [TraceRequest(0.5 * i, 40, 200) for i in range(100)]
    prompts = [TraceRequest(3.0 + 5.0 * i, 1500, 4, priority=1) for i in range(9)]
    trace = sorted([*streams, *prompts], key=lambda one: one.arrival)
    gaps, ttft = {}, {}
    for helpers in (0, 1):
        report, cluster = run("least-loaded", trace, 3 - helpers, helpers=helpers)
        assert report.requests == len(trace) and set(report.reasons) == {"length"}
        gaps[helpers] = report.percentiles("worst_gap", "priority 0")["p99"]
        ttft[helpers] = report.percentiles("ttft", "priority 1")["p50"]
        for engine in [*cluster.engines, *(cluster.helpers.engines if cluster.helpers else [])]:
            assert not engine.num_live and not engine.scheduler.requests
            engine.scheduler.pool.check()
        if cluster.helpers is not None:
            assert cluster.helpers.decisions == {"apart": 9, "short": 100}
    assert gaps[1] < gaps[0] / 3, gaps
    assert ttft[1] < 2 * ttft[0], ttft


def test_pages_travel_while_their_prompt_is_computed():
    link = Link(token_s=0.001, lag_s=0.02, piece=256)
    assert link.seconds(1000, 5.0) == pytest.approx(0.02 + 0.256)  # all but the last piece were there
    assert link.seconds(1000, 0.1) == pytest.approx(0.02 + 0.9)  # the link is the slower part
    assert link.seconds(100, 5.0) == pytest.approx(0.02 + 0.1)


def test_runs_repeat():
    trace = conversations(80)
    first, second = run("cache", trace), run("cache", trace)
    assert first[0].summary(first[1].totals) | {"wall_s": 0} == second[0].summary(second[1].totals) | {"wall_s": 0}


def test_one_hot_prompt_is_spread():
    """All requests begin alike: what is cached would send them all to one engine, and load must not let it."""
    hot = [TraceRequest(0.01 * i, 600, 40, prefix=((1, 590),)) for i in range(120)]
    _, cluster = run("cache", hot, balance=Balance(abs_threshold=4))
    assert cluster.totals.worst_imbalance <= 8
    assert min(target.routed for target in cluster.targets) >= 20
    assert cluster.router.decisions["cache", "imbalance"] > 0


def test_what_one_engine_refuses_another_takes():
    burst = [TraceRequest(0.0, 100, 10) for _ in range(40)]
    report, cluster = run("round-robin", burst, engines=2, max_num_queued_reqs=12)
    assert report.requests == 40
    assert report.reasons["refused"] == 40 - report.reasons["length"] > 0
    assert cluster.totals.retries > 0 and cluster.totals.refused == report.reasons["refused"]


@pytest.mark.parametrize("seed", [1, 2])
def test_agents_share_system_prompts(seed):
    trace = list(itertools.islice(GENERATORS["agents"](1.0, seed), 100))
    firsts = {request.prefix[0] for request in trace}
    assert firsts <= {(i, 600) for i in range(1, 9)} and len(firsts) > 1
    assert all(later.arrival >= one.arrival for one, later in itertools.pairwise(trace))


def test_engines_on_the_same_cores_hold_each_other_up():
    """Two requests at once, each at an engine of its own: a factor of 2 doubles what either takes, and one alone is as ever."""
    pair = [TraceRequest(0.0, 600, 20), TraceRequest(0.0, 600, 20)]

    def took(trace, *prompts, **more):
        report, _ = run("round-robin", trace, 2, sharing=Sharing(prompts, **more))
        return max(report.values("e2e"))

    alone = max(run("round-robin", pair, 2)[0].values("e2e"))
    assert took(pair, 1.0, 2.0) == pytest.approx(2 * alone, rel=0.02)
    assert took(pair, 1.0, 1.0) == pytest.approx(alone) and took(pair[:1], 1.0, 2.0) == pytest.approx(alone)
    # One that comes when the other is half done: neither is held up all the time.
    late = [pair[0], TraceRequest(alone / 2, 600, 20)]
    assert took(late, 1.0, 2.0) == pytest.approx(1.5 * alone, rel=0.05), (
        "both take so long, half of it beside the other"
    )
    one = took(pair, 1.0, 2.0, tokens=(1.0, 1.0))
    assert alone < one < 2 * alone, "prompts hold each other up, steps without them do not"
    free = Sharing((1.0,) * 4)
    first, late = (
        max(run("cache", pair[:1], 2, sharing=one)[0].values("ttft")) for one in (free, Sharing((1.0,), (), (0.5, 9.0)))
    )
    assert late == pytest.approx(first + 0.5), "one has requests: the first way"


def test_engines_on_the_same_cores_that_do_not_hold_each_other_up_are_as_apart():
    """The steps are put together as on machines of their own: one that was scheduled before a request came has no place for it."""
    trace = conversations(150, rate=0.9)
    apart, together = (
        Cluster(config_of(), COST, 3, Router("cache"), sharing=one) for one in (None, Sharing((1.0,) * 3))
    )
    assert by_arrival(apart.run(trace)) == by_arrival(together.run(trace))
    assert apart.router.decisions == together.router.decisions and apart.totals.busy == pytest.approx(
        together.totals.busy
    )


def test_a_gateway_on_the_same_cores_takes_its_share():
    """What it computes for a request comes before the engine gets that, what it computes for a token before that is seen; and
    meanwhile an engine in a step goes on more slowly."""
    one = [TraceRequest(0.0, 600, 20)]

    def ttft(trace, **more):
        report, cluster = run("round-robin", trace, 2, sharing=Sharing((1.0, 2.0, 3.0), cores=2, **more))
        assert all(not engine.num_live for engine in cluster.engines)
        return report.values("ttft"), report.values("e2e")

    (alone,), (whole,) = ttft(one)
    assert ttft(one, front=(0.1, 0.0))[0] == pytest.approx(alone + 0.1), "nobody else was in a step"
    (first,), (last,) = ttft(one, front=(0.0, 0.001))
    assert first == pytest.approx(alone + 0.001, rel=0.02)
    # Each token takes a thread 1 ms, beside a step that the thread makes longer by half of what it takes itself.
    assert last == pytest.approx(whole + 0.001 * (1 + 19 * 0.5), rel=0.02)
    # A second request comes to the other engine while the first is computed: its 0.1 s take 1.5 times as long, and cost a half.
    (held, late), _ = ttft([*one, TraceRequest(0.01, 600, 20)], front=(0.1, 0.0))
    assert late > held > alone + 0.1


def test_factors_between_whole_numbers_are_in_between():
    sharing = Sharing((1.0, 2.0, 4.0), cores=4)
    assert [sharing.factor(True, n) for n in (0, 1, 1.5, 2.25, 3, 6)] == [1.0, 1.0, 1.5, 2.5, 4.0, 8.0]
    assert [sharing.front_factor(n) for n in (0, 1, 3)] == [1.0, 1.25, 3.25]
