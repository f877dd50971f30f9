"""KV events as vLLM's subscribers read them: shapes, numbers, replay."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import zmq

from serving.engine.api.page_events import PageBatch, PageEvent, PagesCleared, PagesRemoved, PagesStored
from serving.engine.cache.page_log import PageLog
from serving.kv_events.config import KVEventsConfig
from serving.kv_events.messages import Encoder
from serving.kv_events.zmq_publisher import END, ZmqPublisher, offset


# What a subscriber declares, by vLLM's documentation of its events: structs of msgspec, told apart by their tags.
class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list
    data_parallel_rank: int | None = None


class _Event(msgspec.Struct, array_like=True, omit_defaults=True, gc=False, tag=True):
    pass


class BlockStored(_Event):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    lora_name: str | None = None


class BlockRemoved(_Event):
    block_hashes: list[bytes]
    medium: str | None = None


class AllBlocksCleared(_Event):
    pass


class KVEventBatch(EventBatch):
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


def stored(first: int, count: int = 2, **more) -> PagesStored:
    tokens = np.arange(8 * first, 8 * (first + count), dtype="<i4").tobytes()
    names = tuple(i.to_bytes(16, "big") for i in range(first, first + count))
    return PagesStored(names, (first - 1).to_bytes(16, "big") if first else None, tokens, 8, **more)


EVENTS: tuple[PageEvent, ...] = (
    stored(0, adapter="digest", salt="s"), stored(2, window=16, group=1), PagesRemoved((b"x" * 16,)), PagesCleared(),
    stored(9, replica=1),
)  # fmt: skip


def test_subscribers_of_arrays_read_them():
    batch = PageBatch(3, 12.5, EVENTS)
    read = msgspec.msgpack.decode(Encoder().encode(batch), type=KVEventBatch)
    first, second, removed, cleared = read.events
    assert (read.ts, read.data_parallel_rank) == (12.5, 0)
    assert isinstance(first, BlockStored) and first.token_ids == list(range(16)) and first.block_size == 8
    assert first.parent_block_hash is None and first.lora_name == "digest" and first.medium == "GPU"
    assert isinstance(second, BlockStored) and second.parent_block_hash == (1).to_bytes(16, "big")
    assert removed == BlockRemoved([b"x" * 16], "GPU") and isinstance(cleared, AllBlocksCleared)
    assert len(msgspec.msgpack.decode(Encoder().encode(batch, replica=1), type=KVEventBatch).events) == 1


def test_maps_have_names():
    read = msgspec.msgpack.decode(Encoder(as_maps=True).encode(PageBatch(3, 12.5, EVENTS)))
    assert [event["type"] for event in read["events"]] == [
        "BlockStored",
        "BlockStored",
        "BlockRemoved",
        "AllBlocksCleared",
    ]
    assert read["events"][0]["extra_keys"] == [["s"], ["s"]] and read["events"][1]["kv_cache_spec_sliding_window"] == 16


def test_published_numbered_and_replayed():
    config = KVEventsConfig(
        True, endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", topic="kv@pod@model", buffer_steps=3
    )
    log = PageLog(config.buffer_steps)
    publisher = ZmqPublisher(config, log)
    context = zmq.Context()
    try:
        subscriber = context.socket(zmq.SUB)
        subscriber.connect(publisher.endpoints[0])
        subscriber.setsockopt(zmq.SUBSCRIBE, b"kv@")
        asker = context.socket(zmq.DEALER)  # a REQ socket would take but one reply
        asker.connect(publisher.replay_endpoints[0])
        publisher.start()
        seen = []
        for i in range(200):  # until the subscription has arrived
            log.add(stored(i, 1))
            log.tell()
            if subscriber.poll(50):
                seen.append(subscriber.recv_multipart())
                break
        for i in range(300, 303):
            log.add(stored(i, 1))
            log.tell()
        while len(seen) < 4 and subscriber.poll(5000):
            seen.append(subscriber.recv_multipart())
        numbers = [int.from_bytes(number, "big") for _, number, _ in seen]
        assert numbers == list(range(numbers[0], numbers[0] + 4)) and {topic for topic, _, _ in seen} == {
            b"kv@pod@model"
        }
        asker.send_multipart([b"", numbers[2].to_bytes(8, "big")])
        replay = []
        while not replay or replay[-1][0] != END:
            assert asker.poll(5000)
            replay.append(asker.recv_multipart()[1:])
        assert [int.from_bytes(number, "big") for number, _ in replay[:-1]] == numbers[2:]
        assert [body for _, body in replay[:-1]] == [body for _, _, body in seen[2:]]
    finally:
        publisher.close()
        context.destroy(linger=0)


def test_an_endpoint_that_cannot_be_is_told():
    with pytest.raises(ValueError, match="kv_events_config: the endpoint"):
        ZmqPublisher(KVEventsConfig(True, endpoint="nonsense://*:1"), PageLog())
    assert offset("tcp://*:5557", 2) == "tcp://*:5559" and offset("inproc://a", 1) == "inproc://a_dp1"
    with pytest.raises(ValueError, match="no port"):
        offset("tcp://host", 1)


@pytest.mark.parametrize(
    "text,word",
    [("{", "no JSON"), ("[]", "JSON object"), ('{"endpont": ""}', "no field 'endpont'"), ('{"publisher": "nats"}', "publisher"),
     ('{"buffer_steps": 0}', "at least 1"), ('{"topic": 3}', "of type str"), ('{"encoding": "xml"}', "encoding")],
)  # fmt: skip
def test_a_wrong_configuration_is_told(text, word):
    with pytest.raises(ValueError, match=word):
        KVEventsConfig.of(text)


def test_nothing_is_told_unless_it_is_asked_for():
    assert not KVEventsConfig.of(None).enable_kv_cache_events
    assert KVEventsConfig.of('{"enable_kv_cache_events": true}').endpoint == "tcp://*:5557"
