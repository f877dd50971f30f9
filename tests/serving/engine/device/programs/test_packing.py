"""From a plan through one flat array to the step that a model is given."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.device.programs.packing import (
    decode_rows,
    forward_behind,
    forward_layout,
    make_step,
    pack_forward,
    pack_sample,
    sample_behind,
    sample_layout,
)
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.plan import Chunk, StepPlan
from serving.engine.requests.request import Request
from serving.engine.requests.slots import SlotTable

PAGE, PAGES = 16, 4


def running(slots: SlotTable, name: str, tokens: list[int], pages: list[int]) -> Request:
    request = Request(EngineRequest(name, tuple(tokens), SamplingParams(seed=5, temperature=0.5)), 0)
    request.pages = [pages, [page + 100 for page in pages]]
    slots.acquire(request)
    return request


@pytest.fixture
def slots():
    return SlotTable(4, PAGES, groups=2)


def step_of(plan: StepPlan, bucket: Bucket, slots: SlotTable, ends):
    layout = forward_layout(bucket, PAGES, groups=2)
    f = layout.unpack(jax.numpy.asarray(pack_forward(plan, bucket, layout, slots, PAGE)))
    return jax.tree.map(np.asarray, make_step(f, *decode_rows(f, ends), ((0, 0), (1, 0)), PAGE)), f


def ends(slots: SlotTable, known: dict[int, tuple[int, int]]):
    """DeviceState.ends, with (last token, length) of some slots and nonsense in the others."""
    last, length = np.full(slots.num_slots + 1, 777, np.int32), np.full(slots.num_slots + 1, 55, np.int32)
    for slot, (token, positions) in known.items():
        last[slot], length[slot] = token, positions
    return jax.numpy.asarray(last), jax.numpy.asarray(length)


def test_a_mixed_step(slots):
    known = running(slots, "known", list(range(20)), [3, 4])
    ahead = running(slots, "ahead", list(range(31)), [5, 6, 7])  # its next token is on the device
    prompt = running(slots, "prompt", list(range(50, 90)), [8, 9, 10])
    chunks = (Chunk(known, 0, 3, False, 0), Chunk(prompt, 16, 24, True, 16))
    # As if the device had sampled one token less than the host thought possible: it knows better.
    plan = StepPlan(1, (known, ahead), (19, 35), chunks, (), (known, ahead, prompt))
    bucket = Bucket(4, 64, 3)
    step, f = step_of(plan, bucket, slots, ends(slots, {ahead.slot: (42, 32)}))
    batch = step.attention
    assert step.tokens_T[:2].tolist() == [19, 42] and step.tokens_T[4:7].tolist() == [0, 1, 2]
    assert step.tokens_T[20:44].tolist() == list(range(66, 90))
    assert step.positions_T[:4].tolist() == [19, 32, 0, 0] and step.positions_T[20:44].tolist() == list(range(16, 40))
    assert batch.decode_len_B.tolist() == [20, 33, 0, 0] and batch.decode_qlen_B is None
    want = np.array([4 * PAGE + 3, 7 * PAGE, 0, 0])
    assert batch.kv_index_T[:, :4].tolist() == [want.tolist(), np.where(want, want + 100 * PAGE, 0).tolist()]
    assert batch.kv_index_T[0, 20] == 9 * PAGE and batch.kv_index_T[1, 43] == 110 * PAGE + 7
    assert batch.chunk_start_R.tolist() == [0, 16, 0] and batch.chunk_qlen_R.tolist() == [3, 24, 0]
    assert batch.chunk_len_R.tolist() == [3, 40, 0] and batch.chunk_row_N.tolist() == [0, 1, 1, 3]
    assert batch.places == ((0, 0), (1, 0))
    assert step.last_R.tolist() == [0, 1, 0]  # of the first piece nothing is read, of the other what samples
    assert f["sample_row_S"][:3].tolist() == [0, 1, 4 + 16 + 23]


@pytest.mark.parametrize(
    "asked,read", [({}, 0), ({"prompt_logprobs": 0}, 8), ({"pooling": "mean"}, 8), ({"pooling": "last"}, 1)]
)
def test_what_is_read_of_a_piece_that_does_not_sample(asked, read):
    pooling = asked.get("pooling")
    params = SamplingParams(prompt_logprobs=asked.get("prompt_logprobs"))
    request = Request(EngineRequest("one", tuple(range(20)), params, pooling=pooling), 0)
    assert Chunk(request, 12, 8, False, 0).read == read
    assert Chunk(request, 8, 8, False, 0).read == (read if read != 1 else 0)


def test_nothing_is_left_out_where_a_head_hears():
    fields = [
        {name for name, *_ in forward_layout(Bucket(4, 64, 3), PAGES, heads=heads).fields} for heads in (True, False)
    ]
    assert ["chunk_last_R" in names for names in fields] == [False, True]


def test_the_step_behind_another_is_the_devices(slots):
    """Of two replicas end to end: real rows take up where their slots are, padding stays as it is."""
    known = running(slots, "known", list(range(20)), [3, 4])
    ahead = running(slots, "ahead", list(range(31)), [5, 6, 7])
    bucket, plan = Bucket(4, 0, 0), StepPlan(1, (known, ahead), (19, 35), (), (), (known, ahead))
    layout, sampled = forward_layout(bucket, PAGES, groups=2), sample_layout(bucket.samples)
    flat = np.tile(pack_forward(plan, bucket, layout, slots, PAGE), 2)
    for part in forward_behind(flat, bucket, layout).reshape(2, -1):
        was, f = layout.views(flat[: layout.size]), layout.views(part)
        assert f["tokens_T"].tolist() == [-1, -1, 0, 0] and f["decode_start_B"].tolist() == [-1, -1, 0, 0]
        assert all((f[name] == was[name]).all() for name in f.keys() - {"tokens_T", "decode_start_B"})
    drawn = np.tile(pack_sample(plan, bucket.samples, sampled, slots, False), 2)
    for part in sample_behind(drawn, sampled).reshape(2, -1):
        assert (sampled.views(part)["length_S"] == -1).all()
        assert (sampled.views(part)["slot_S"] == sampled.views(drawn[: sampled.size])["slot_S"]).all()


def test_rows_with_drafts(slots):
    one = running(slots, "one", list(range(15)), [3, 4])
    two = running(slots, "two", list(range(31)), [5, 6, 7])
    plan = StepPlan(1, (one, two), (14, 31), (), (), (one, two), drafts=((90, 91, 92), (80,)))
    assert plan.queries == 4 and plan.num_tokens == 6
    assert [plan.most_tokens(row) for row in range(2)] == [4, 2]
    step, _ = step_of(plan, Bucket(2, 0, 0, 4), slots, ends(slots, {two.slot: (42, 31)}))
    batch = step.attention
    assert step.tokens_T.reshape(2, 4).tolist() == [[14, 90, 91, 92], [42, 80, 0, 0]]
    assert step.positions_T.reshape(2, 4).tolist() == [[14, 15, 16, 17], [31, 32, 0, 0]]
    assert batch.decode_qlen_B.tolist() == [4, 2] and batch.decode_len_B.tolist() == [18, 33]
    index = [[3 * PAGE + 14, 3 * PAGE + 15, 4 * PAGE, 4 * PAGE + 1], [6 * PAGE + 15, 7 * PAGE, 0, 0]]
    assert batch.kv_index_T[0].reshape(2, 4).tolist() == index
    assert (batch.queries, batch.num_decode_tokens, batch.num_chunk) == (4, 8, 0)


def test_what_a_draw_reads(slots):
    known = running(slots, "known", list(range(20)), [3, 4])
    ahead = running(slots, "ahead", list(range(31)), [5, 6, 7])
    chunk = Chunk(known, 0, 3, True, 0)
    plan = StepPlan(1, (known, ahead), (19, 31), (chunk,), (), (known, ahead, known))
    layout = sample_layout(4)
    f = layout.views(pack_sample(plan, 4, layout, slots, masked=True))
    assert f["slot_S"].tolist() == [known.slot, ahead.slot, known.slot, slots.per_replica]
    assert f["length_S"].tolist() == [20, -1, 3, 0]
    assert f["prompt_len_S"].tolist() == [20, 31, 20, 0]
    assert f["temperature_S"].tolist() == [0.5, 0.5, 0.5, 0.0] and f["top_p_S"].tolist() == [1.0] * 4
    assert f["seed_S"].tolist() == [[0, 5], [0, 5], [0, 5], [0, 0]] and f["masked"].tolist() == [1]
    assert f["num_logprobs_S"].tolist() == [-1] * 4


def test_the_parts_of_replicas():
    slots = SlotTable(2, PAGES, replicas=2, groups=2)
    requests = []
    for replica, name in enumerate("abab"):
        request = Request(EngineRequest(name + str(replica), (1, 2), SamplingParams()), 0)
        request.replica, request.pages = replica % 2, [[1], [2]]
        slots.acquire(request)
        requests.append(request)
    plan = StepPlan(1, tuple(requests), (2, 3, 4, 5), (), (), tuple(requests), drafts=((7,), (), (8, 9), (6,)))
    part = plan.of_replica(1)
    assert (part.decode_positions, part.drafts) == ((3, 5), ((), (6,)))
    assert dataclasses.replace(plan, drafts=()).of_replica(0).drafts == ()
