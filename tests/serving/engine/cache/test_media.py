"""Whose embeddings are in the store, and how pieces of prompts wait for them; no device."""

import numpy as np
import pytest

from serving.engine.api.media import Media, MediaItem
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache.media import MediaCache
from serving.engine.requests.plan import StepResult
from serving.engine.requests.request import Request
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.scheduling.scheduler import Scheduler

PLACE = 7


def item(name: bytes, first: int, size: int) -> MediaItem:
    patches = np.zeros((size, 4), np.float32)
    return MediaItem(
        name.ljust(32), np.arange(first, first + size, dtype=np.int32), patches, np.zeros((size, 2), np.int32)
    )


def spec(name: str, length: int, *items: MediaItem, **more) -> EngineRequest:
    tokens = [10] * length
    for one in items:
        for place in one.places_N:
            tokens[place] = PLACE
    params = SamplingParams(max_tokens=4, temperature=0.0)
    return EngineRequest(name, tuple(tokens), params, media=Media(items, length), **more)


def scheduler(rows: int, pages: int = 64, tokens: int = 64, **more) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=tokens, max_chunk_tokens=tokens, max_chunk_rows=4, max_model_len=256,
            page_size=8, num_pages=pages, media_rows=rows, **more,
        )
    )  # fmt: skip


def run(work: Scheduler) -> tuple[list[bytes], dict[str, list[int]]]:
    """Steps until nothing is left: (digests that were encoded, in order; of each request where its pieces ended)."""
    encoded: list[bytes] = []
    ends: dict[str, list[int]] = {}
    for _ in range(200):
        plan = work.schedule()
        if plan is None:
            break
        there = {one.item.digest for one in plan.moves.encodings}
        encoded += [one.item.digest.strip() for one in plan.moves.encodings]
        for chunk in plan.chunks:
            ends.setdefault(chunk.request.request_id, []).append(chunk.end)
            for index, one in chunk.request.spec.media.overlapping(chunk.start, chunk.end):
                rows = chunk.request.media_rows[index]
                assert len(rows) == one.size and (one.digest in there or one.digest.strip() in encoded)
        sampled = len(plan.sampled)
        work.retire(plan, StepResult(np.full((sampled, 1), 11, np.int32), np.ones((sampled, 1), bool)))
        for manager in work.kv.managers:
            manager.media.check()
    assert not work.has_work
    return encoded, ends


def test_an_image_that_several_send_is_encoded_once():
    work = scheduler(rows=64)
    for name in "abc":
        work.add(spec(name, 40, item(b"one", 5, 20)))
    encoded, _ = run(work)
    assert encoded == [b"one"]
    cache = work.kv.managers[0].media
    assert cache.misses == 1 and cache.hits >= 0


def test_a_piece_stops_before_an_image_for_which_there_is_no_room():
    work = scheduler(rows=24)
    work.add(spec("a", 60, item(b"one", 5, 20), item(b"two", 30, 20)))
    encoded, ends = run(work)
    assert encoded == [b"one", b"two"]
    assert ends["a"][0] == 30, "the first piece ends where the second image begins"


def test_images_of_several_requests_take_turns():
    work = scheduler(rows=20, tokens=48)
    for name in "abcd":
        work.add(spec(name, 40, item(name.encode(), 5, 20), item(name.encode() * 2, 26, 10)))
    encoded, _ = run(work)
    assert sorted(set(encoded)) == [b"a", b"aa", b"b", b"bb", b"c", b"cc", b"d", b"dd"]


def test_a_steps_images_are_bounded_beyond_the_first():
    work = scheduler(rows=200, tokens=48)
    cache = MediaCache(200, budget=30)
    request = Request(spec("a", 200, item(b"one", 0, 40), item(b"two", 50, 20), item(b"three", 80, 20)), 0)
    assert cache.reach(request, 200) == 50, "one alone goes beyond the bound; the next waits"
    assert [one.item.digest.strip() for one in cache.take_step()] == [b"one"]
    assert cache.reach(request, 200) == 80
    assert work.kv.managers[0].media.num_rows == 200


def test_what_nobody_holds_gives_way_and_what_somebody_holds_does_not():
    cache = MediaCache(30, budget=100)
    first, second = Request(spec("a", 40, item(b"one", 0, 20)), 0), Request(spec("b", 40, item(b"two", 4, 20)), 1)
    assert cache.reach(first, 40) == 40
    assert cache.reach(second, 40) == 4
    first.num_computed = 40
    cache.reached(first)
    assert cache.reach(second, 40) == 40
    cache.leave(second)
    cache.leave(second)  # nothing more to give back
    cache.check()


def test_other_weights_find_nothing_again():
    cache = MediaCache(64, budget=100)
    first = Request(spec("a", 40, item(b"one", 0, 20)), 0)
    cache.reach(first, 40)
    cache.take_step()
    cache.forget()
    second = Request(spec("b", 40, item(b"one", 0, 20)), 1)
    cache.reach(second, 40)
    assert len(cache.take_step()) == 1, "encoded anew"
    assert not set(first.media_rows[0]) & set(second.media_rows[0]), "the first still reads its own rows"
    for request in (first, second):
        cache.leave(request)
    cache.check()


@pytest.mark.parametrize(
    ("other", "cached"),
    [(item(b"one", 5, 20), 48), (item(b"two", 5, 20), 0), (item(b"one", 6, 19), 0)],
    ids=["the same", "another image", "another place"],
)
def test_prefixes_are_told_apart_by_their_images(other, cached):
    work = scheduler(rows=64)
    work.add(spec("a", 50, item(b"one", 5, 20)))
    run(work)
    work.add(spec("b", 50, other))
    plan = work.schedule()
    assert plan.chunks[0].start == cached
    if cached:
        assert not plan.moves.encodings, "what lies in the prefix needs no embeddings"


def test_a_prefix_may_end_inside_an_image():
    work = scheduler(rows=64)
    work.add(spec("a", 50, item(b"one", 5, 40)))
    run(work)
    shorter = spec("b", 48, item(b"one", 5, 40))
    work.add(shorter)
    plan = work.schedule()
    assert plan.chunks[0].start == 40, "40 of the places 5 to 44"
    assert [one.rows.tolist() for one in plan.moves.encodings] or work.kv.managers[0].media.hits


def test_a_request_that_is_preempted_inside_an_image_comes_back():
    work = scheduler(rows=40, pages=9, tokens=16, enable_prefix_caching=False)
    for name in "ab":
        work.add(spec(name, 30, item(name.encode(), 5, 20)))
    run(work)
    assert work.pool.num_free == 8
