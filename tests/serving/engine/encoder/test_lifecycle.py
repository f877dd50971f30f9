"""Pausing, sleeping, new weights and faults on purpose, of an encoder."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.embedding_head import Dense, EmbeddingHead
from serving.engine.api.lifecycle import Lifecycle
from serving.errors import ErrorKind, RequestError
from serving.reliability.faults import Fault, FaultyRunner
from serving.service.control import ServerControl
from tests.mock_engine import mock_service, until
from tests.tiny_encoder import tiny_encoder, tiny_encoder_engine, tiny_runner

TEXT = tuple(range(5, 12))


def copied(model=None):
    """Another model with the same weights: what sleeps gives its arrays up, and other tests use the original's."""
    graph, weights = nnx.split(tiny_encoder("BertModel") if model is None else model)
    return nnx.merge(graph, jax.tree.map(jnp.copy, weights))


def as_loaded(model, **embedding):
    """What reading a checkpoint with these weights gives."""
    return SimpleNamespace(model=model, config=model.config, embedding=EmbeddingHead(**embedding))


@pytest.fixture
def engine():
    engine = tiny_encoder_engine()
    original = engine.runner._leaves
    engine.runner.replace_weights(tuple(map(jnp.copy, original)))
    engine.runner.guard.count = 0
    engine.lifecycle = Lifecycle(engine, lambda name: as_loaded(copied()))
    yield engine
    engine.shutdown()
    tiny_runner("embed").replace_weights(original, EmbeddingHead())


async def embedded(engine, name="a"):
    return await engine.client.embed(name, TEXT)


async def test_a_paused_encoder_takes_no_batch_and_goes_on_afterwards(engine):
    before = await embedded(engine)
    await asyncio.to_thread(engine.lifecycle.pause)
    steps = engine.stats.num_steps
    waiting = asyncio.create_task(embedded(engine, "b"))
    await until(lambda: len(engine.queue) == 1, "the text to wait")
    await asyncio.sleep(0.05)
    assert engine.lifecycle.paused and not waiting.done() and engine.stats.num_steps == steps
    await asyncio.to_thread(engine.lifecycle.resume)
    assert np.array_equal(await waiting, before) and not engine.lifecycle.paused


@pytest.mark.parametrize("level", [1, 2])
async def test_asleep_it_holds_no_weights_and_refuses(engine, level):
    before = await embedded(engine)
    held = engine.runner._leaves
    freed = await asyncio.to_thread(engine.lifecycle.sleep, level)
    assert freed == sum(leaf.size * leaf.dtype.itemsize for leaf in held) and all(leaf.is_deleted() for leaf in held)
    with pytest.raises(RequestError, match="asleep") as caught:
        await embedded(engine)
    assert caught.value.kind is ErrorKind.UNAVAILABLE
    with pytest.raises(RequestError, match="wake it up first"):
        await asyncio.to_thread(engine.lifecycle.resume)
    await asyncio.to_thread(engine.lifecycle.wake)
    after = await embedded(engine)
    assert np.array_equal(after, before)
    engine.runner.guard.check()


async def test_new_weights_of_another_shape_are_refused_and_the_old_ones_serve_on(engine):
    before = await embedded(engine)

    def wrong(name):
        raise ValueError("the checkpoint has 3 arrays, the served model 40.")

    engine.lifecycle = Lifecycle(engine, wrong)
    with pytest.raises(RequestError, match="The weights cannot be used"):
        await asyncio.to_thread(engine.lifecycle.update_weights, "other")
    assert np.array_equal(await embedded(engine), before)
    graph, weights = nnx.split(tiny_encoder("BertModel"))
    halved = nnx.merge(graph, jax.tree.map(lambda leaf: leaf / 2, weights))
    engine.lifecycle = Lifecycle(engine, lambda name: as_loaded(halved))
    await asyncio.to_thread(engine.lifecycle.update_weights, "other")
    assert not np.allclose(await embedded(engine), before, atol=1e-3)


async def test_the_servers_control_reaches_it(engine):
    control = ServerControl(mock_service(engine.client))
    assert (await control.pause()).paused
    assert not (await control.resume()).paused
    assert (await control.sleep()).asleep
    assert not (await control.wake()).asleep
    await control.reset_prefix_cache()


async def test_new_weights_bring_what_their_checkpoint_does_behind_the_pooling(engine):
    before = await embedded(engine)
    doubled = Dense(np.diag(np.arange(1.0, 33.0)).astype(np.float32), None, "Identity")
    heads = {
        "other": {"modes": ("cls",), "steps": (doubled,), "prompts": (("query", "q: "),), "default_prompt": "q: "},
        "odd": {"modes": ("max",)},
    }
    engine.lifecycle = Lifecycle(engine, lambda name: as_loaded(copied(), **heads.get(str(name), {})))
    with pytest.raises(RequestError, match="pooling is 'max'"):
        await asyncio.to_thread(engine.lifecycle.update_weights, "odd")
    assert np.array_equal(await embedded(engine), before) and engine.client.info().pooling == "mean"
    await asyncio.to_thread(engine.lifecycle.update_weights, "other")
    info = engine.client.info()
    assert (info.pooling, info.prompts, info.default_prompt) == ("cls", (("query", "q: "),), "q: ")
    first = await engine.client.embed("c", TEXT, pooling="cls")
    assert np.array_equal(await embedded(engine), first) and not np.allclose(first, before, atol=1e-3)


async def test_after_a_deep_sleep_the_weights_that_were_served_last_are_read(engine):
    read = []
    engine.lifecycle = Lifecycle(engine, lambda name: read.append(name) or as_loaded(copied()))
    await asyncio.to_thread(engine.lifecycle.sleep, 2)
    await asyncio.to_thread(engine.lifecycle.wake)
    await asyncio.to_thread(engine.lifecycle.update_weights, "other")
    await asyncio.to_thread(engine.lifecycle.sleep, 2)
    await asyncio.to_thread(engine.lifecycle.wake)
    assert read == [None, "other", "other"]


async def test_new_weights_bring_their_labels():
    engine = tiny_encoder_engine(task="score")
    model = tiny_encoder("BertForSequenceClassification")
    facts = [fact for fact in model.config.extra if not fact[0].startswith("label")]
    config = dataclasses.replace(model.config, extra=(*facts, ("labels", ("spam",)), ("label_activation", "identity")))
    loaded = SimpleNamespace(model=model, config=config, embedding=EmbeddingHead())
    engine.lifecycle = Lifecycle(engine, lambda name: loaded)
    service = mock_service(engine.client)
    assert service.info.labels == ("LABEL_0",)
    raw, before = [await engine.client.classify(f"c{raw}", TEXT, raw=raw) for raw in (True, False)]
    await ServerControl(service).update_weights("other")
    assert service.info.labels == engine.client.info().labels == ("spam",)
    after = await engine.client.classify("d", TEXT)
    assert after == pytest.approx(raw) and after != pytest.approx(before)
    engine.shutdown()


@pytest.mark.parametrize("kind", ["step-error", "out-of-memory", "transfer-error", "step-error:2"])
async def test_a_batch_that_failed_is_tried_again(engine, kind):
    before = await embedded(engine)
    engine.wrap_runner(lambda runner: FaultyRunner(runner, [fault(kind)]))
    texts = [TEXT, TEXT[:3], TEXT[2:]]
    found = await asyncio.gather(*(engine.client.embed(f"r{i}", text) for i, text in enumerate(texts)))
    assert np.allclose(found[0], before, atol=1e-5) and engine.client.healthy
    assert engine.client.stats().num_failed_steps == (2 if kind.endswith(":2") else 1)


async def test_who_makes_batches_fail_is_told_and_the_others_are_answered(engine):
    """The poisonous ones stand first, in the middle and last; a request of several texts fails as one."""
    rows = [(5, 9), (7, 9), (8, 6), (9, 9), (3, 9), (4, 9), (6, 9)]
    before = [await engine.client.embed(f"b{i}", row) for i, row in enumerate(rows)]
    engine.wrap_runner(lambda runner: FaultyRunner(runner, [fault("poison:6")]))
    await asyncio.to_thread(engine.lifecycle.pause)
    work = [asyncio.create_task(engine.client.embed(f"r{i}", row)) for i, row in enumerate(rows)]
    await until(lambda: len(engine.queue) == len(rows), "all to wait")
    await asyncio.to_thread(engine.lifecycle.resume)
    found = await asyncio.gather(*work, return_exceptions=True)
    for row, mine, wanted in zip(rows, found, before, strict=True):
        if 6 in row:
            assert isinstance(mine, RequestError) and mine.kind is ErrorKind.INTERNAL
            assert "failed on this request" in mine.message
        else:
            assert isinstance(mine, np.ndarray) and np.allclose(mine, wanted, atol=1e-5)
    assert engine.client.healthy and engine.client.num_live == 0 and not engine.queue.turns
    assert np.allclose(await engine.client.embed("after", rows[0]), before[0], atol=1e-5)


async def test_what_always_fails_ends_the_engine(engine):
    engine.wrap_runner(lambda runner: FaultyRunner(runner, [fault("step-error:1000")]))
    work = [engine.client.embed(f"r{i}", TEXT) for i in range(12)]
    found = await asyncio.gather(*work, return_exceptions=True)
    assert all(isinstance(one, RequestError) and one.kind is ErrorKind.INTERNAL for one in found)
    assert await asyncio.to_thread(engine.died.wait, 60)
    assert engine.failure is not None and "injected" in str(engine.failure)


def fault(text: str) -> Fault:
    kind, _, argument = text.partition(":")
    return Fault(kind, 1, float(argument) if argument else None)
