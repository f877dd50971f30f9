"""Page tables of several groups of layers: what is found, taken, kept and given back in each."""

from __future__ import annotations

import dataclasses

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache.kv_manager import KVManager
from serving.engine.cache.kv_windows import pages_of, window_pages
from serving.engine.cache.page_pool import PagePool
from serving.engine.requests.cache_specs import paged
from serving.engine.requests.request import Request, RequestState
from serving.engine.requests.slots import SlotTable
from tests.serving.engine.scheduling.test_scheduler import CONFIG, Driver, request

SIZE, WINDOW = 8, 16


class Pages:
    """A KV manager, and requests that compute all they have at once."""

    def __init__(self, num_pages=200, windows=(None, WINDOW), chunk=1000, **options):
        self.pool = PagePool(num_pages, SIZE)
        self.kv = KVManager(self.pool, SlotTable(4, 100, groups=len(windows)), windows, chunk, **options)
        self.count = 0

    def new(self, prompt):
        self.count += 1
        return Request(EngineRequest(f"r{self.count}", tuple(prompt), SamplingParams()), self.count)

    def admit(self, prompt):
        made = self.new(prompt)
        assert self.kv.admit(made, 0)
        made.move(RequestState.RUNNING)
        return made

    def compute(self, made):
        end = len(made.tokens)
        assert self.kv.cover(made, end, 0) >= end
        made.num_computed = end
        self.kv.register(made)

    def leave(self, made):
        self.kv.leave(made, 0)
        self.pool.check()

    def evict(self, wanted):
        """Evicts cached pages, the longest unused first, until none of the wanted is left."""
        taken = []
        while not set(wanted).isdisjoint(self.pool._lru):
            taken += self.pool.allocate(1) or []
        self.pool.release(taken)


def prompt(count, first=0):
    return [(first + 3 * i) % 1000 for i in range(count)]


def test_a_group_with_a_window_takes_pages_as_pieces_are_computed():
    pages = Pages(windows=(None, WINDOW, WINDOW), chunk=32)
    made = pages.admit(prompt(400))
    assert [len(table) for table in made.pages] == [50, 4, 4]
    for start in range(0, 400, 32):
        end = min(start + 32, 400)
        assert pages.kv.cover(made, end, 0) >= end
        held = [len(table) - behind for table, behind in zip(made.pages, made.behind, strict=True)]
        assert held[0] == 50 and max(held[1:]) <= window_pages(WINDOW, 32, SIZE)
        made.num_computed = end
        pages.kv.register(made)
    assert made.behind == [0, 46, 46]  # of the last piece, from 384 on, the first attends to 369
    pages.leave(made)
    assert pages.pool.num_free == 199


def test_a_hit_needs_of_a_window_only_its_end():
    pages = Pages()
    made = pages.admit(prompt(81))
    pages.compute(made)
    windowed = made.pages[1]
    pages.leave(made)
    again = pages.admit(prompt(81))
    assert again.num_computed == 80 and again.behind == [0, 8]
    assert again.pages[1][:10] == [0] * 8 + windowed[8:10] and again.pages[1][10] != 0
    pages.compute(again)
    pages.leave(again)
    assert pages.pool.num_free == 199


def test_no_hit_where_a_window_lacks_a_page_but_a_shorter_one_before_it():
    pages = Pages()
    made = pages.admit(prompt(81))
    pages.compute(made)
    full, windowed = made.pages
    pages.leave(made)
    # As if page 8 had been evicted: prefixes of 9 and 10 pages need it, one of 8 pages needs 6 and 7.
    page = windowed[8]
    digest, _ = pages.pool._held.pop(page)
    del pages.pool._index[digest]
    del pages.pool._lru[page]
    pages.pool._free.append(page)
    assert pages.kv.cached_pages(pages.new(prompt(81))) == 8
    again = pages.admit(prompt(81))
    assert again.num_computed == 64 and again.pages[0][:8] == full[:8] and again.pages[1][6:8] == windowed[6:8]
    pages.compute(again)  # what is computed anew is indexed where it was missing
    pages.leave(again)
    assert pages.kv.cached_pages(pages.new(prompt(81))) == 10


def test_a_prefix_is_found_after_the_windows_earlier_pages_were_evicted():
    pages = Pages(chunk=16)
    made = pages.admit(prompt(161))
    for end in range(16, 161, 16):
        assert pages.kv.cover(made, end, 0) >= end
        made.num_computed = end
        pages.kv.register(made)
    pages.compute(made)
    behind = [*pages.pool._lru]
    assert len(behind) == made.behind[1] > 10  # all are of the window's group: the other's are held
    pages.evict(behind)
    pages.leave(made)
    assert pages.kv.cached_pages(pages.new(prompt(161))) == 20
    assert pages.kv.cached_pages(pages.new(prompt(81))) == 0, "those would need the pages that are gone"


def compute_in_pieces(pages, made, size=16):
    """Computes all of a request as the scheduler does, and ends it."""
    for end in [*range(made.num_computed + size, len(made.tokens), size), len(made.tokens)]:
        assert pages.kv.cover(made, end, 0) >= end
        made.num_computed = end
        pages.kv.register(made)
    pages.leave(made)


def test_a_short_prefix_outlives_the_long_texts_behind_it():
    """Pages behind a window come free first, but those that a prefix needs where prompts part stay as long as the prefix."""
    pages = Pages(num_pages=1 + 70, chunk=16)
    system = prompt(64)
    for number in range(2):  # the second shows where prompts part
        compute_in_pieces(pages, pages.admit(system + prompt(320, first=100 + number)))
    for number in range(2, 6):  # each takes 48 pages and, behind each other, as many that come free
        made = pages.admit(system + prompt(320, first=100 + number))
        assert made.num_computed == 64, number
        compute_in_pieces(pages, made)


def test_a_prompt_is_found_after_a_long_completion():
    pages = Pages(num_pages=1 + 70, chunk=16)
    made = pages.admit(prompt(65))
    compute = made.num_computed
    assert compute == 0
    made.tokens += prompt(300, first=7)
    compute_in_pieces(pages, made)
    assert pages.kv.cached_pages(pages.new(prompt(65))) == 8


def test_of_one_request_the_end_is_evicted_first_in_every_group():
    pages = Pages(windows=(None, 1000))
    made = pages.admit(prompt(80))
    pages.compute(made)
    tables = [[*table] for table in made.pages]
    pages.leave(made)
    assert [*pages.pool._lru] == [page for i in reversed(range(10)) for page in (tables[1][i], tables[0][i])]


def test_groups_do_not_take_each_others_pages_for_a_prefix():
    pages = Pages(windows=(None, None))
    made = pages.admit(prompt(41))
    pages.compute(made)
    assert set(made.pages[0]).isdisjoint(made.pages[1])
    again = pages.admit(prompt(41))
    assert [table[:5] for table in again.pages] == [table[:5] for table in made.pages]


def test_admission_leaves_room_for_prompts_that_have_begun():
    need = pages_of(400, (None, WINDOW), SIZE, chunk=32)
    pages = Pages(num_pages=need + 1, chunk=32)
    made = pages.admit(prompt(400))
    free = pages.pool.num_free
    assert free == window_pages(WINDOW, 32, SIZE) - 4  # its first piece has four
    assert not pages.kv.admit(pages.new(prompt(8, first=7)), 0), "what is free will be taken by the prompt"
    assert pages.pool.num_free == free
    pages.leave(made)
    assert pages.kv.admit(pages.new(prompt(8, first=7)), 0)


def test_as_much_is_covered_as_there_are_pages():
    pages = Pages(windows=(None, 64), chunk=16)
    made = pages.admit(prompt(400))
    others = pages.pool.allocate(pages.pool.num_free - 3) or []
    assert pages.kv.lacking(made, 400) == 48
    assert pages.kv.cover(made, 400, 0) == (2 + 3) * SIZE and pages.pool.num_free == 0
    assert pages.kv.cover(made, 400, 0) == (2 + 3) * SIZE
    assert not pages.kv.cover_all([made], [400], 0)
    pages.pool.release(others)
    assert pages.kv.cover_all([made], [400], 0) and made.reach == 50


def test_the_host_tier_keeps_the_pages_of_every_group():
    pages = Pages(num_pages=40, host_pages=100)
    made = pages.admit(prompt(81))
    pages.compute(made)
    pages.leave(made)
    (taken,) = [pages.pool.allocate(39)]
    pages.pool.release(taken)
    spilled = {move.page: move.key for move in pages.kv.take_step().pages_out}
    assert len(spilled) == 20
    again = pages.admit(prompt(81))
    assert again.num_computed == 80
    restored = pages.kv.take_step().pages_in
    assert [move.page for move in restored] == again.pages[0][:10] + again.pages[1][8:10]
    assert {move.key for move in restored} <= set(spilled.values())
    assert len({move.key for move in restored}) == 12


WINDOWS = dataclasses.replace(
    CONFIG, caches=paged(None, 16, 16), max_model_len=400, num_pages=400, max_num_batched_tokens=32, max_chunk_tokens=32
)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_most_that_a_long_prompt_takes(asynchronous):
    """All its pages where everything is seen; elsewhere those of the window and of the pieces in flight."""
    d = Driver(WINDOWS, asynchronous)
    d.add(request("long", prompt(350), 40))
    most = 0
    while d.busy:
        d.step()
        cached = d.scheduler.pool.num_cached
        most = max(most, WINDOWS.num_pages - 1 - d.scheduler.pool.num_free)
    d.verify()
    one = window_pages(16, 32, SIZE)
    assert most <= 49 + 2 * (one + 4 * asynchronous)  # 4: of the step that has not retired
    assert most > 44 and cached > most


def test_the_same_pages_hold_more_sequences_at_once():
    """Eight sequences of 380 tokens; with three page tables that keep everything they would take 8 * 48 * 3 pages."""
    peaks = {}
    for windows in ((None, None, None), (None, 16, 16)):
        config = dataclasses.replace(
            WINDOWS,
            caches=paged(*windows),
            num_pages=1 + 480,
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_chunk_tokens=64,
        )
        d = Driver(config)
        for i in range(8):
            d.add(request(f"r{i}", prompt(280, first=i), 100))
        peak = 0
        while d.scheduler.has_work:
            d.step()
            peak = max(peak, len(d.scheduler.running))
        d.drain()
        d.verify()
        peaks[windows] = peak
    assert peaks[None, None, None] < peaks[None, 16, 16] == 8


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("windows", [(None, 16, 16), (16, 40), (None, 1)])
def test_the_smallest_pool_runs_the_longest_sequence(windows, prefix, asynchronous):
    """With fewer pages than its pieces could fill: they are cut to what there is."""
    config = dataclasses.replace(
        WINDOWS, caches=paged(*windows), enable_prefix_caching=prefix, max_num_batched_tokens=300, max_chunk_tokens=300,
        num_pages=1 + pages_of(400, windows, SIZE),
    )  # fmt: skip
    d = Driver(config, asynchronous)
    for i in range(3):
        d.add(request(f"r{i}", prompt(390, first=i), 10))
    d.drain(3000)
    d.verify()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_prompts_are_preempted_in_the_middle(asynchronous, prefix):
    """Windows of one piece and more, and a pool that does not hold what two prompts take: the later one gives way."""
    config = dataclasses.replace(
        WINDOWS, num_pages=1 + pages_of(400, WINDOWS.windows, SIZE, 32), enable_prefix_caching=prefix, policy="priority"
    )
    d = Driver(config, asynchronous)
    d.add(request("late", prompt(200), 60, priority=1))
    for _ in range(4):
        d.step()
    middle = d.scheduler.requests["late"]
    assert 0 < middle.num_computed < 200
    d.add(request("urgent", prompt(300, first=5), 60, priority=0))
    d.drain()
    d.verify()
    assert middle.num_preemptions > 0
