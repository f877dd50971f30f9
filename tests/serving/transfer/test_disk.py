"""Pages that leave host memory for files: found again, by the next process too, and never believed."""

from __future__ import annotations

import dataclasses
import os

import pytest

from serving.engine.api.peers.stats import REASONS
from tests.serving.engine.test_engine import run, settle
from tests.serving.transfer.test_two_engines import SIZES, prompt, request
from tests.tiny import tiny_engine

POOLS = {**SIZES, "host_pages": 12}
PAGE_BYTES = 3 * 2 * 8 * 2 * 16 * 4


def started(folder, capacity=2**20):
    return tiny_engine(disk=(folder, capacity), **POOLS)


def tier(engine):
    return engine.loop.peers.disk[0]


async def fill(engine, count=8):
    """Prompts one after the other, of which the pools keep the last few alone; what each was answered."""
    return [(await run(engine, request(f"f{i}", prompt(120, i)))).token_ids for i in range(count)]


def written(engine):
    """Pages in files, once nothing waits."""
    tier(engine)._queue.join()
    return tier(engine).num_written


async def test_pages_come_back_in_this_process_and_the_next(tmp_path):
    engine = started(tmp_path)
    try:
        answers = await fill(engine)
        assert written(engine) > 30
        found = await run(engine, request("again", prompt(120, 0)))
        assert found.token_ids == answers[0] and found.num_cached_tokens == 112
        assert tier(engine).num_read > 0
        await settle(engine)
    finally:
        engine.shutdown()
    engine = started(tmp_path)
    try:
        assert len(tier(engine)) > 30, "the files are found"
        for i, answer in enumerate(answers):
            found = await run(engine, request(f"again{i}", prompt(120, i)))
            assert found.token_ids == answer
            assert found.num_cached_tokens == 112 or i >= 4, "what was in the pools at the end is computed"
        await settle(engine)
    finally:
        engine.shutdown()


async def test_damaged_files_are_not_believed(tmp_path):
    engine = started(tmp_path)
    try:
        answers = await fill(engine)
        written(engine)
    finally:
        engine.shutdown()
    files = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    for i, path in enumerate(files):
        raw = bytearray(path.read_bytes())
        if i % 3 == 0:
            raw[-1] ^= 1  # content
        elif i % 3 == 1:
            raw = raw[:100]  # a write that did not end
        else:
            raw = bytearray(files[(i + 1) % len(files)].read_bytes())  # another page's
        path.write_bytes(raw)
    engine = started(tmp_path)
    try:
        found = await run(engine, request("again", prompt(120, 0)))
        assert found.token_ids == answers[0] and found.num_cached_tokens == 0
        stats = engine.loop.peers.stats
        assert stats.fallbacks[REASONS.index("wrong_digest")] == 1 and tier(engine).num_wrong == 1
        assert len(tier(engine)) == len(files) - 1, "the one that was looked at is deleted"
        await settle(engine)
    finally:
        engine.shutdown()


async def test_the_folder_is_bounded_and_the_oldest_go(tmp_path):
    size = PAGE_BYTES + 48
    engine = started(tmp_path, 20 * size)
    try:
        await fill(engine)
        written(engine)
        assert tier(engine).bytes <= 20 * size
    finally:
        engine.shutdown()
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) <= 20 and all(p.stat().st_size == size for p in files)


async def test_other_weights_find_nothing(tmp_path):
    engine = started(tmp_path)
    try:
        await fill(engine)
        assert written(engine)
        engine.call(engine.loop.peers.weights_changed)
        before = tier(engine).num_read
        await run(engine, request("again", prompt(120, 0)))
        assert tier(engine).num_read == before
    finally:
        engine.shutdown()


def test_a_folder_that_cannot_be_used_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="kv_disk"):
        started(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


async def test_salts_keep_their_own(tmp_path):
    engine = started(tmp_path)
    try:
        await fill(engine)
        written(engine)
        found = await run(engine, dataclasses.replace(request("again", prompt(120, 0)), cache_salt="another"))
        assert found.num_cached_tokens == 0
    finally:
        engine.shutdown()
