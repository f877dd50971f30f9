"""Which texts go into a batch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.engine.encoder.queue import EncoderQueue
from serving.engine.encoder.runner import EncoderBucket, EncoderBuckets, Text

BUCKETS = EncoderBuckets.make(max_model_len=100, max_rows=8, max_tokens=256)


def queue(*lengths: int, priorities: tuple[int, ...] = ()) -> EncoderQueue:
    made = EncoderQueue(BUCKETS)
    for i, length in enumerate(lengths):
        made.add(Text((1,) * length), f"r{i}", 0, priorities[i] if priorities else 0)
    return made


def taken(q: EncoderQueue) -> list[str]:
    return [job.request for job in q.take()]


def test_buckets():
    assert {b.length for b in BUCKETS.buckets} == {16, 32, 64, 100}
    assert [b.rows for b in BUCKETS.buckets if b.length == 16] == [1, 4, 8]
    assert BUCKETS.most_rows(100) == 2
    assert BUCKETS.find(64, 2) == EncoderBucket(64, 4)
    assert EncoderBuckets.make(512, 64, 128).most_rows(512) == 1  # one text is always a batch
    assert EncoderBuckets.make(8, 1, 1).buckets == (EncoderBucket(8, 1),)


def test_those_of_one_length_go_together_and_shorter_ones_fill_the_padding():
    q = queue(60, 5, 50, 90, 40, 6)
    assert taken(q) == ["r0", "r1", "r2", "r4"]  # three of 64 make a batch of four rows: r1 has the spare one
    assert taken(q) == ["r3"]
    assert taken(q) == ["r5"]
    assert taken(q) == []


def test_priority_then_arrival():
    q = queue(5, 5, 60, priorities=(1, 1, 0))
    assert taken(q) == ["r2"]
    assert taken(q) == ["r0", "r1"]


def test_a_request_that_left():
    q = queue(5, 6, 7)
    q.remove("r1")
    assert (len(q), q.num_tokens) == (2, 12)
    assert taken(q) == ["r0", "r2"]
    assert (len(q), q.num_tokens) == (0, 0)


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 2)), max_size=60))
def test_every_text_is_taken_once_and_every_batch_fits(texts):
    q = EncoderQueue(BUCKETS)
    for i, (length, priority) in enumerate(texts):
        q.add(Text((1,) * length), i, 0, priority)
    seen: list[int] = []
    while batch := q.take():
        length = max(job.length for job in batch)
        assert len(batch) <= BUCKETS.most_rows(length)
        first = min(batch)
        assert all((first.priority, first.turn) <= (job.priority, job.turn) for job in q._heap)
        seen += [job.request for job in batch]
    assert sorted(seen) == list(range(len(texts)))
