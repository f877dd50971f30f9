"""Decisions of the router: each policy, thresholds, sessions, wishes of whoever stands in front."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, EngineStats
from serving.routing.policies import POLICIES, Balance
from serving.routing.prefixes import ToldPrefixes
from serving.routing.router import NO_WISH, Route, Router, Wish
from serving.routing.targets import Target

PAGE = 16


def request(tokens, **more) -> EngineRequest:
    return EngineRequest("r", tuple(tokens), SamplingParams(max_tokens=4), **more)


def router_of(count: int, policy: str = "cache", **more) -> tuple[Router, list[Target]]:
    router = Router(policy, **more)
    return router, [router.add(f"t{i}", PAGE, 1000) for i in range(count)]


def serve(router: Router, targets: list[Target], tokens, completion=(1,), wish=NO_WISH, **more) -> Route:
    """A request from its beginning to its end."""
    route = router.route(request(tokens, **more), targets, wish)
    assert route is not None
    router.end(router.begin(route, route.order[0]), completion)
    return route


def test_the_cache_decides_then_load():
    router, targets = router_of(3)
    first = serve(router, targets, range(64))
    assert first.reason == "load" and first.matched_tokens == 0
    again = serve(router, targets, range(80))
    assert again.reason == "prefix" and again.order[0] is first.order[0] and again.matched_tokens == 64
    other = serve(router, targets, range(1000, 1064))
    assert other.reason == "load" and other.order[0] is not first.order[0]
    assert router.decisions == {("cache", "load"): 2, ("cache", "prefix"): 1}
    assert (router.matched_tokens, router.prompt_tokens) == (64, 64 + 80 + 64)


def test_the_next_turn_follows_its_answer():
    router, targets = router_of(2)
    first = serve(router, targets, range(32), completion=range(500, 532))
    turn = [*range(32), *range(500, 532), *range(700, 710)]
    found = serve(router, targets, turn)
    assert found.order[0] is first.order[0] and found.matched_tokens == 64


def test_a_small_shared_part_does_not_decide():
    router, targets = router_of(2, balance=Balance(cache_threshold=0.5))
    first = serve(router, targets, range(16))
    found = serve(router, targets, [*range(16), *range(100, 200)])
    assert found.reason == "load" and found.order[0] is not first.order[0]


def test_adapters_and_salts_have_their_own_prefixes():
    router, targets = router_of(2)
    serve(router, targets, range(64))
    assert serve(router, targets, range(64), adapter="a").matched_tokens == 0
    assert serve(router, targets, range(64), cache_salt="s").matched_tokens == 0
    assert serve(router, targets, range(64), cache_salt="s").matched_tokens == 64


def test_an_overloaded_target_is_spared_although_it_has_the_prefix():
    router, targets = router_of(2, balance=Balance(abs_threshold=3, rel_threshold=1.5))
    places = []
    for _ in range(20):  # nobody ever finishes: one hot prefix
        route = router.route(request(range(64)), targets)
        assert route is not None
        router.begin(route, route.order[0])
        places.append((route.order[0].name, route.reason))
        assert router.imbalance <= 4
    assert Counter(name for name, _ in places)["t0"] in range(8, 13)
    assert {"prefix", "imbalance", "load"} == {reason for _, reason in places}


def test_full_pages_are_a_reason_to_go_elsewhere():
    router, targets = router_of(2)
    first = serve(router, targets, range(64)).order[0]
    other = next(one for one in targets if one is not first)
    first.told(EngineStats(num_pages_free=1, num_pages_total=100))
    other.told(EngineStats(num_pages_free=60, num_pages_total=100))
    found = serve(router, targets, range(64))
    assert found.reason == "kv" and found.order[0] is other
    other.told(EngineStats(num_pages_free=0, num_pages_total=100))
    assert serve(router, targets, range(64)).reason == "prefix"  # full everywhere


def test_requests_of_others_count():
    router, targets = router_of(2, "least-loaded")
    targets[0].told(EngineStats(num_running=5, num_waiting=2))
    assert targets[0].load == 7
    assert {serve(router, targets, range(9)).order[0].name for _ in range(4)} == {"t1"}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_spreads_what_has_nothing_in_common(policy):
    router, targets = router_of(4, policy)
    for i in range(200):
        route = router.route(request(range(1000 * i, 1000 * i + 64)), targets)
        assert route is not None and {one.name for one in route.order} == {f"t{i}" for i in range(4)}
        router.begin(route, route.order[0])
    counts = sorted(target.live for target in targets)
    assert counts[0] > 20 and sum(counts) == 200
    if policy not in ("random",):
        assert counts == [50] * 4 or (policy == "power-of-two" and counts[-1] - counts[0] < 10)


def test_round_robin_takes_turns_and_knows_no_prefix():
    router, targets = router_of(3, "round-robin")
    assert [serve(router, targets, range(64)).order[0].name for _ in range(6)] == ["t0", "t1", "t2"] * 2
    assert router.matched_tokens == 0 and len(router.prefixes("t0")) == 0


def test_a_session_stays_until_its_target_is_gone_or_overloaded():
    router, targets = router_of(3, "round-robin", balance=Balance(abs_threshold=2))
    wish = Wish(session="alice")
    first = serve(router, targets, range(5), wish=wish).order[0]
    assert {serve(router, targets, range(5), wish=wish).order[0] for _ in range(4)} == {first}
    rest = [one for one in targets if one is not first]
    moved = serve(router, rest, range(5), wish=wish)
    assert moved.order[0] is not first and router.moved_sessions == 1
    assert serve(router, targets, range(5), wish=wish).order[0] is moved.order[0]
    moved.order[0].live = 10
    assert serve(router, targets, range(5), wish=wish).order[0] is not moved.order[0]
    moved.order[0].live = 0


def test_sessions_are_bounded():
    router, targets = router_of(2, max_sessions=10)
    for i in range(50):
        serve(router, targets, range(5), wish=Wish(session=str(i)))
    assert len(router._sessions) == 10


def test_whoever_stands_in_front_decides():
    router, targets = router_of(3)
    assert serve(router, targets, range(64), wish=Wish(endpoints=("gone", "t2", "t0"))).order[0].name == "t2"
    assert router.decisions["cache", "endpoint"] == 1
    among = serve(router, targets, range(64), wish=Wish(among=frozenset({"t0", "t1"})))
    assert {one.name for one in among.order} == {"t0", "t1"}
    assert router.route(request(range(4)), targets, Wish(among=frozenset({"gone"}))) is None


def test_an_adapter_goes_where_it_is():
    router, targets = router_of(3)
    targets[0].adapters, targets[1].adapters, targets[2].adapters = frozenset(), frozenset({"d"}), frozenset({"e"})
    route = serve(router, targets, range(64), adapter="d")
    assert [one.name for one in route.order] == ["t1"] and route.reason == "only"
    assert router.route(request(range(4), adapter="unknown"), targets) is None


def test_a_lost_cache_is_forgotten_and_a_lost_target_too():
    router, targets = router_of(2)
    first = serve(router, targets, range(64)).order[0]
    router.forget(first.name)
    assert serve(router, targets, range(64)).matched_tokens == 0
    route = router.route(request(range(64)), targets)
    assert route is not None
    visit = router.begin(route, route.order[0])
    router.remove(route.order[0].name)
    router.end(visit, (1, 2))  # what ran there ends without harm
    assert len(router.targets) == 1
    with pytest.raises(ValueError, match="twice"):
        router.add(next(iter(router.targets)))


def test_a_router_that_is_started_anew_has_lost_its_tree_alone():
    """Conversations go on: each finds an engine at once, and its own by prefix from its second request on."""
    router, targets = router_of(3)
    talks = [list(range(1000 * i, 1000 * i + 64)) for i in range(6)]
    for talk in talks:
        serve(router, targets, talk)
    anew, targets = router_of(3)
    firsts = [serve(anew, targets, [*talk, 1, 2]) for talk in talks]
    assert {one.reason for one in firsts} == {"load"} and {one.chosen for one in firsts} == set(targets)
    for first, talk in zip(firsts, talks, strict=True):
        again = serve(anew, targets, [*talk, 1, 2, *range(30)])
        assert again.reason == "prefix" and again.chosen is first.chosen and again.matched_tokens == 64


def test_who_tells_of_its_pages_is_not_forgotten_from_outside():
    router, targets = router_of(1)
    told = ToldPrefixes(PAGE)
    told.stored([b"a"], None, range(PAGE), (None, None))
    router.use("t0", told)
    router.forget("t0")
    assert serve(router, targets, range(PAGE)).matched_tokens == PAGE


def test_a_decision_is_told_without_addresses():
    router, targets = router_of(2)
    route = serve(router, targets, range(64))
    said = route.explain(7)
    assert said == "target=7; policy=cache; reason=load; matched=0/64; load=0; targets=2"
    assert "reason=retry" in route.explain(1, attempt=1)


@pytest.mark.parametrize(
    "wrong", [{"cache_threshold": 1.5}, {"abs_threshold": -1}, {"rel_threshold": 0.5}, {"kv_threshold": -1}]
)
def test_thresholds_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="threshold"):
        Balance(**wrong)
    with pytest.raises(ValueError, match="policy must be one of"):
        Router("magic")


def test_the_longest_prefix_is_what_each_target_would_say():
    """Targets come and go, remember and tell, forget and evict: who has the longest prefix is found without asking each."""
    rng = random.Random(5)
    router, told = Router("cache"), {}
    names = itertools.count()
    for step in range(600):
        what = rng.random()
        if len(router.targets) < 3 or (what < 0.08 and len(router.targets) < 8):
            name = f"t{next(names)}"
            router.add(name, rng.choice((2, 2, 4)), rng.choice((4, 40)))
            if rng.random() < 0.4:
                told[name] = ToldPrefixes(2)
                told[name].stored([b"early"], None, [0, 0], (None, None))
                router.use(name, told[name])
        elif what < 0.12:
            router.remove(rng.choice(list(router.targets)))
        elif what < 0.15:
            router.forget(rng.choice(list(router.targets)))
        elif what < 0.25 and (telling := [name for name in told if name in router.targets]):
            known = told[rng.choice(telling)]
            if rng.random() < 0.5:
                known.stored([step], None, [rng.randrange(2), rng.randrange(2)], (None, None))
            elif rng.random() < 0.8:
                known.removed(rng.sample(range(step + 1), min(step, 50)))
            else:
                known.clear()
        else:
            targets = [one for one in router.targets.values() if rng.random() < 0.9] or list(router.targets.values())
            asked = request([rng.randrange(2) for _ in range(rng.randrange(1, 14))])
            route = router.route(asked, targets)
            assert route is not None
            each = {
                one.name: known.match(route.chains.of(known.block_tokens)) * known.block_tokens
                for one in targets
                for known in [router.prefixes(one.name)]
            }
            tokens, having = router._longest(targets, route.chains)
            assert tokens == max(each.values())
            assert {one.name for one in having} == {name for name, n in each.items() if n == tokens > 0}
            assert route.matched_tokens == each[route.chosen.name]
            completion = rng.choice((None, (), (1, 0, 1)))
            router.end(router.begin(route, rng.choice(route.order)), completion)
    for name in list(router.targets):
        router.remove(name)
    assert not any(len(holders) for holders in router._holders.values()), "nobody is left, and nothing of them"
