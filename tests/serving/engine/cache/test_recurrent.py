"""Recurrent groups: states and their snapshots. The fake device's state is a digest of every token seen, so that a state of
other tokens shows in the next one."""

from __future__ import annotations

import dataclasses
import random

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from serving.engine.requests.cache_specs import PagedSpec, RecurrentSpec, StateArray, paged
from serving.engine.requests.scheduler_config import SchedulerConfig
from tests.serving.engine.scheduling.test_scheduler import CONFIG, Driver, request, walk

ARRAYS = (StateArray("conv", (3, 64)), StateArray("matrix", (4, 16, 16)))
SPEC = RecurrentSpec(ARRAYS, interval=24, tail=8, worth=8)
HYBRID = dataclasses.replace(CONFIG, caches=(PagedSpec(), SPEC), num_snapshots=20, num_pages=60)


def prompt(count, first=0):
    return [(first + 7 * i) % 50 for i in range(count)]


def hit(d, name):
    """Tokens that the request found computed."""
    return next(r for plan in d.plans for r in plan.admitted if r.request_id == name).num_cached_tokens


def one(d, name, tokens, count=4, **kw):
    d.add(request(name, tokens, count, **kw))
    d.drain()
    return hit(d, name)


def test_a_state_has_bytes():
    assert SPEC.state_bytes == 4 * (3 * 64 + 4 * 16 * 16)
    assert dataclasses.replace(SPEC, arrays=(StateArray("conv", (3, 64), "bfloat16"),)).state_bytes == 384
    with pytest.raises(ValueError, match="at most one"):
        dataclasses.replace(CONFIG, caches=(SPEC, SPEC))


def test_a_prompt_is_cut_where_snapshots_are_taken_and_found_there():
    d = Driver(HYBRID)
    assert one(d, "a", prompt(60)) == 0
    # Every 24 tokens, and at the last full page: of 60 tokens 56, the last token apart.
    assert [c.length for plan in d.plans for c in plan.chunks] == [24, 24, 8, 4]
    assert one(d, "b", prompt(60)) == 56
    assert one(d, "c", prompt(59)) == 56
    assert one(d, "d", prompt(50)) == 48
    assert one(d, "e", prompt(40)) == 24, "pages for 32 are there, a state is not"
    d.verify()


def test_a_snapshot_that_saves_little_is_not_worth_a_piece():
    d = Driver(dataclasses.replace(HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400, worth=48))))
    one(d, "a", prompt(40))
    assert [c.length for plan in d.plans for c in plan.chunks] == [40]
    d.plans.clear()
    one(d, "b", prompt(60, first=3))
    assert [c.length for plan in d.plans for c in plan.chunks] == [56, 4]


def test_where_prompts_part_a_snapshot_is_taken_for_the_third():
    d = Driver(dataclasses.replace(HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400))))
    system = prompt(43)
    assert one(d, "a", system + prompt(30, first=1)) == 0
    assert one(d, "b", system + prompt(30, first=2)) == 0
    assert one(d, "c", system + prompt(30, first=3)) == 40
    d.verify()


def test_the_end_of_a_turn_is_kept_when_told():
    d = Driver(dataclasses.replace(HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400))))
    system = prompt(43)
    one(d, "a", system + prompt(30, first=1), turn_ends=(43,))
    assert one(d, "b", system + prompt(30, first=2)) == 40


def test_the_first_turns_end_is_kept_by_itself():
    d = Driver(dataclasses.replace(HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400))))
    system = [*prompt(42), 99]
    for name, last in (("a", 1), ("b", 2)):
        d.add(request(name, system + prompt(30, first=last), 4, eos_token_ids=(98, 99)))
        d.drain()
    assert (hit(d, "a"), hit(d, "b")) == (0, 40)


def computed(caches, prompts, **more):
    """Prompt tokens that were computed for requests that arrive one a step, more than run at once, behind the first one."""
    sizes = {"max_num_seqs": 8, "max_model_len": 2048, "num_pages": 3000, "max_num_batched_tokens": 256}
    config = dataclasses.replace(CONFIG, caches=caches, num_snapshots=64, max_chunk_tokens=256, **sizes)
    d = Driver(config)
    for i, tokens in enumerate(prompts):
        d.add(request(f"r{i}", tokens, 4, **more))
        d.step() if i else d.drain()
    d.drain()
    d.verify()
    return sum(chunk.length for plan in d.plans for chunk in plan.chunks)


def test_sharing_costs_a_hybrid_little_more_than_attention_alone():
    """64 users behind a system prompt of 1,000 tokens, with the default places of snapshots."""
    spec = RecurrentSpec(ARRAYS)
    system = [*prompt(999), 99]
    prompts = [[*system, 100 + i, *prompt(60 + 7 * i % 90, first=i)] for i in range(64)]
    both = [computed(caches, prompts, eos_token_ids=(99,)) for caches in ((PagedSpec(),), (PagedSpec(), spec))]
    assert both[1] <= 1.15 * both[0], both


def test_a_conversation_costs_a_hybrid_little_more_than_attention_alone():
    """Ten turns, the answers' tokens included."""
    found = []
    for caches in ((PagedSpec(),), (PagedSpec(), RecurrentSpec(ARRAYS))):
        d = Driver(dataclasses.replace(CONFIG, caches=caches, num_snapshots=64, max_model_len=4096, num_pages=1000))
        history = [*prompt(300), 99]
        for turn in range(10):
            history += prompt(80 + turn, first=turn)
            one(d, f"turn {turn}", history, 50, eos_token_ids=(99,))
            history += [*d.tokens[f"turn {turn}"], 99]
        d.verify()
        found.append(sum(chunk.length for plan in d.plans for chunk in plan.chunks))
    assert found[1] <= 1.15 * found[0], found


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_next_turn_begins_where_the_answer_ended(asynchronous):
    d = Driver(dataclasses.replace(HYBRID, max_model_len=400), asynchronous)
    history = prompt(20)
    for turn in range(8):
        found = one(d, f"turn {turn}", history, 23)
        # The last completion token is never computed; the tail lies at whole pages.
        assert found >= (len(history) - 5 - 1) // 8 * 8 - 8 if turn else found == 0
        history += d.tokens[f"turn {turn}"] + prompt(5, first=turn)
    d.verify()


def test_a_tail_gives_its_row_to_the_next_one():
    d = Driver(dataclasses.replace(HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400))))
    one(d, "a", prompt(9), 60)
    (manager,) = d.scheduler.kv.managers
    assert d.events["state saved"] == 8 and len(manager.snapshots) == 2  # the prompt's last full page, and the tail


@pytest.mark.parametrize("caches", [(PagedSpec(), SPEC), (SPEC,), (*paged(None, 16), SPEC)])
def test_no_snapshots_no_hits_but_every_token_right(caches):
    d = Driver(dataclasses.replace(HYBRID, caches=caches, num_snapshots=0))
    one(d, "a", prompt(60))
    assert one(d, "b", prompt(60)) == 0
    d.verify()
    d = Driver(dataclasses.replace(HYBRID, caches=caches, enable_prefix_caching=False))
    one(d, "a", prompt(60))
    assert one(d, "b", prompt(60)) == 0 and not d.events["state saved"]
    d.verify()


def test_the_least_recently_used_snapshot_makes_way():
    d = Driver(
        dataclasses.replace(
            HYBRID, caches=(PagedSpec(), dataclasses.replace(SPEC, interval=400, tail=400)), num_snapshots=2
        )
    )
    one(d, "a", prompt(30))
    one(d, "b", prompt(30, first=1))
    assert one(d, "a again", prompt(30)) == 24
    one(d, "c", prompt(30, first=2))
    assert one(d, "a once more", prompt(30)) == 24
    assert one(d, "b again", prompt(30, first=1)) == 0
    d.verify()


def test_with_fewer_rows_than_a_step_would_save_some_are_left_out():
    d = Driver(dataclasses.replace(HYBRID, num_snapshots=2, max_num_batched_tokens=128, max_chunk_tokens=128))
    for name in "abcd":
        d.add(request(name, [*prompt(24, first=ord(name)), 1]))
    d.drain()
    d.verify()
    assert max(len(plan.moves.states_saved) for plan in d.plans) == 2


def test_a_preempted_request_goes_on_from_its_newest_snapshot():
    d = Driver(dataclasses.replace(HYBRID, num_pages=16, max_num_seqs=2))
    for name in ("a", "b"):
        d.add(request(name, prompt(20, first=ord(name)), 60))
    d.drain()
    d.verify()
    assert d.scheduler.counters.preemptions > 0
    assert d.events["state loaded"] > 0


def test_new_weights_find_no_old_state():
    d = Driver(HYBRID)
    one(d, "a", prompt(60))
    d.scheduler.kv.forget()
    assert one(d, "b", prompt(60)) == 0
    (manager,) = d.scheduler.kv.managers
    manager.snapshots.check([])


CACHES = {
    "hybrid": (PagedSpec(), SPEC),
    "windows": (*paged(None, 16), SPEC),
    "only windows": (*paged(16), SPEC),
    "only states": (SPEC,),
}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", CACHES)
def test_random_walk(name, asynchronous):
    """20,000 steps in all: every token is that of the sequence alone, every page, state and snapshot comes back."""
    _walk(name, 2500, len(name) + asynchronous, asynchronous)


@pytest.mark.parametrize("name", CACHES)
def test_random_walk_with_drafts(name):
    """A step with drafts leaves states as they are until it is known how many tokens it gave: none is of a draft that was wrong."""
    how = SpeculativeConfig("ngram", num_speculative_tokens=5, enable_adaptive_verification=False)
    d = _walk(name, 500, len(name), True, speculative_config=how, buckets=None)
    assert d.events["drafts"] > 20 and 0 < d.scheduler.counters.accepted_tokens < d.scheduler.counters.draft_tokens


@pytest.mark.slow
@pytest.mark.parametrize("name", CACHES)
def test_long_random_walk(name):
    """100,000 steps in all."""
    _walk(name, 25_000, len(name), True)


def _walk(name, steps, seed, asynchronous, **more):
    rng = random.Random(seed)
    sizes = {"num_pages": 40 if len(CACHES[name]) > 2 else 22}
    d = walk(
        steps, seed, asynchronous, caches=CACHES[name], num_snapshots=rng.choice([3, 12]), max_waiting_time=None,
        num_scheduler_steps=rng.choice([1, 1, 3]), **sizes, **more,
    )  # fmt: skip
    assert d.scheduler.counters.prefix_hits > steps / 10
    assert d.events["state loaded"] > steps / 100 and d.events["state saved"] > steps / (60 if more else 20)
    return d


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_keep_their_own_states(replicas):
    config = SchedulerConfig(
        3, 64, 64, 4, 96, 8, 24, replicas=replicas, caches=(PagedSpec(), SPEC), num_snapshots=6
    )  # fmt: skip
    d = Driver(config)
    rng = random.Random(replicas)
    stems = [prompt(24, first=i) for i in range(4)]
    for i in range(120):
        tokens = rng.choice(stems) + prompt(rng.randrange(1, 30), first=rng.randrange(50))
        d.add(EngineRequest(f"r{i}", tuple(tokens), SamplingParams(temperature=0, max_tokens=rng.randrange(1, 20))))
        for _ in range(rng.randrange(3)):
            d.step()
    d.drain()
    d.verify()
    assert d.events["state loaded"] > 20
    assert {move.replica for plan in d.plans for move in plan.moves.states_loaded} == set(range(replicas))
