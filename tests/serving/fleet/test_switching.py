"""Real engines: three tiny models with memory for two. Every answer is the model's own, a second wake compiles nothing, and nothing
is left behind."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import threading

import jax
import pytest

from serving.boot.flags.launch import parse
from serving.engine.api.client import Where
from serving.engine.api.sampling_params import SamplingParams
from serving.fleet.start import FleetOptions, start_fleet
from serving.service import GenerateInput, collect
from tests.tiny_checkpoint import write_tiny_checkpoint

NAMES = "abc"
SMALL = [
    "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--max-model-len", "64",
    "--kv-cache-memory", "1MiB", "--no-progress", "--dtype", "float32",
]  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


DRAFTS = [None, pytest.param("ngram", marks=pytest.mark.slow), pytest.param("draft_model", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=DRAFTS)
def started(request, tmp_path_factory):
    """With drafts, the first model guesses for all of them: its weights go and come with each."""
    folder = tmp_path_factory.mktemp("models")
    models = [f"{name}={write_tiny_checkpoint(folder / name, seed)}" for seed, name in enumerate(NAMES)]
    given = [word for model in models for word in ("--model", model)]
    if request.param is not None:
        how = {"method": request.param, "num_speculative_tokens": 2, "enable_adaptive_verification": False}
        how |= {"model": str(folder / "a")} if request.param == "draft_model" else {"prompt_lookup_max": 1}
        given += ["--speculative-config", json.dumps(how)]
    args, _ = parse([*given, *SMALL, "--compile-cache", str(folder / "programs")])
    started = start_fleet(args.entries, FleetOptions(memory=1 << 30, turn_s=0.05), say=lambda line: None)
    started.memory = int(2.5 * started.members[0].need)  # known now
    yield started
    started.shutdown()


async def ask(fleet, model, prompt="w5 w6 w7", params=GREEDY):
    service = fleet.of(model)
    prepared = await service.prepare(GenerateInput(text=prompt, model=model), params)
    return tuple((await collect(prepared, service.generate(prepared))).outputs[0].token_ids)


def arrays():
    gc.collect()
    return len(jax.live_arrays()), sum(one.nbytes for one in jax.live_arrays())


MALL_INFO = "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"


class MallInfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in MALL_INFO]


def in_use():
    """Bytes that the allocator has given out and not got back, in all of its heaps, and the arrays' beside; 0 without glibc 2.33.
    Resident memory also has what is free again in one heap of sixteen, which says nothing."""
    gc.collect()
    try:
        ask = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    ask.restype = MallInfo
    found = ask()
    return found.uordblks + found.hblkhd


async def test_mixed_load_is_answered_right_and_nothing_compiles_or_stays_behind(started):
    fleet = started.service()
    right = {(name, prompt): await ask(fleet, name, prompt) for name in NAMES for prompt in ("w5 w6 w7", "w9")}
    assert len(set(right.values())) == 6  # three models, and they differ
    assert sum(one.where is Where.LOADED for one in started.members) == 2
    for name in NAMES:  # a wake each: what follows is a second one at least
        await ask(fleet, name)
    before, threads, taken = arrays(), threading.active_count(), in_use()
    asked = [(name, prompt) for _ in range(4) for name in NAMES for prompt in ("w5 w6 w7", "w9")]
    assert await asyncio.gather(*(ask(fleet, *one) for one in asked)) == [right[one] for one in asked]
    for _ in range(7):
        for name in NAMES:
            assert await ask(fleet, name) == right[name, "w5 w6 w7"]
    after = arrays()
    assert after[0] <= before[0] + 8 and after[1] <= 1.2 * before[1], (before, after)
    assert in_use() - taken < 4 << 20, "twenty answers and as many switches left something"
    assert threading.active_count() <= threads + 8  # a pool's
    for member in started.members:
        assert member.switches >= 6 and member.stats.num_recompilations == 0
    await fleet.abort_all()


@pytest.mark.slow
async def test_two_hundred_switches_leave_nothing_behind(started):
    fleet = started.service()
    right = {name: await ask(fleet, name) for name in NAMES}
    left = []
    for turn in range(200):
        name = NAMES[turn % 3]
        assert await ask(fleet, name) == right[name]
        if turn in (20, 199):
            left.append((*arrays(), in_use()))
    (n0, b0, r0), (n1, b1, r1) = left
    assert n1 <= n0 + 8 and b1 <= 1.2 * b0 and r1 - r0 < 4 << 20, left
    assert all(member.stats.num_recompilations == 0 for member in started.members)
    await fleet.abort_all()


async def test_unloading_gives_all_back_and_the_next_request_loads_again(started):
    fleet = started.service()
    right = await ask(fleet, "a")
    await fleet.of("a").client.residence.unload()
    member = started.members[0]
    assert member.engine is None and member.where is Where.UNLOADED and member.bytes == 0
    assert await ask(fleet, "a") == right
    await fleet.abort_all()


async def test_a_stream_that_gives_way_goes_on_with_the_same_tokens(started):
    fleet = started.service()
    long = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)

    alone = {name: await ask(fleet, name, "w5", long) for name in NAMES}
    many = [name for _ in range(3) for name in NAMES]
    assert await asyncio.gather(*(ask(fleet, name, "w5", long) for name in many)) == [alone[name] for name in many]
    await fleet.abort_all()
