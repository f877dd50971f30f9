"""Pausing, sleeping, new weights and faults on purpose, of an encoder."""

from __future__ import annotations

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

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


@pytest.fixture
def engine():
    engine = tiny_encoder_engine()
    original = engine.runner._leaves
    engine.runner.replace_weights(tuple(map(jnp.copy, original)))
    engine.runner.guard.count = 0
    engine.lifecycle = Lifecycle(engine, lambda name: copied())
    yield engine
    engine.shutdown()
    tiny_runner("embed").replace_weights(original)


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
    engine.lifecycle = Lifecycle(engine, lambda name: halved)
    await asyncio.to_thread(engine.lifecycle.update_weights, "other")
    assert not np.allclose(await embedded(engine), before, atol=1e-3)


async def test_the_servers_control_reaches_it(engine):
    control = ServerControl(mock_service(engine.client))
    assert (await control.pause()).paused
    assert not (await control.resume()).paused
    assert (await control.sleep()).asleep
    assert not (await control.wake()).asleep
    await control.reset_prefix_cache()


@pytest.mark.parametrize("kind", ["step-error", "transfer-error", "poison:6"])
async def test_faults_on_purpose_strike(engine, kind):
    name, _, argument = kind.partition(":")
    fault = Fault(name, 1, float(argument) if argument else None)
    engine.wrap_runner(lambda runner: FaultyRunner(runner, [fault]))
    with pytest.raises(RequestError, match="engine died"):
        await embedded(engine)
    assert engine.failure is not None and "injected" in str(engine.failure)
