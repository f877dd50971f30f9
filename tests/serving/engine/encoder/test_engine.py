"""The engine of encoders: what it computes, batches, refuses and survives."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.pooling import pool
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest, TokenPair
from serving.engine.encoder.engine import EncoderEngine
from serving.errors import ErrorKind, RequestError
from tests.mock_engine import until
from tests.tiny_encoder import LONGEST, WIDTH, tiny_encoder, tiny_encoder_engine, tiny_runner

TEXTS = [tuple(range(5, 5 + n)) for n in (3, 1, 17, 40, 16, 33, 2, 8)]


@pytest.fixture(scope="module")
def engine():
    engine = tiny_encoder_engine()
    yield engine
    engine.shutdown()


@pytest.fixture(scope="module")
def scorer():
    engine = tiny_encoder_engine(task="score")
    yield engine
    engine.shutdown()


def hidden_of(architecture, text, segments=()):
    """hidden_1SD of one text alone, S being LONGEST, and its length_1."""
    rows = np.zeros((2, 1, LONGEST), np.int32)
    rows[0, 0, : len(text)], rows[1, 0, : len(segments)] = text, segments
    length = jnp.array([len(text)], jnp.int32)
    return _encode(architecture)(rows[0], length, rows[1]), length


@functools.cache
def _encode(architecture):
    return jax.jit(tiny_encoder(architecture).encode)


def alone(text, mode="mean"):
    return np.asarray(pool(*hidden_of("BertModel", text), mode))[0]


class Blocked:
    """Holds an engine's batches back until told, and notes their sizes."""

    def __init__(self, engine: EncoderEngine):
        self.engine, self.go, self.entered = engine, threading.Event(), threading.Event()
        self.run = engine.runner.run
        self.sizes: list[int] = []

    def __enter__(self):
        def run(texts):
            self.sizes.append(len(texts))
            self.entered.set()
            assert self.go.wait(60)
            return self.run(texts)

        self.real, self.engine.runner.run = self.run, run
        return self

    def __exit__(self, *_):
        self.go.set()
        self.engine.runner.run = self.real


def embed_all(engine, texts, **more):
    async def every():
        return await asyncio.gather(*(engine.client.embed(f"r{i}", t, **more) for i, t in enumerate(texts)))

    return asyncio.run(every())


def test_nothing_is_compiled_after_the_start(engine):
    before = engine.runner.guard.count
    for n in (1, 2, 4, 8):
        embed_all(engine, TEXTS[:n])
        embed_all(engine, [text[:1] for text in TEXTS[:n]], pooling="cls")
    assert engine.runner.guard.armed
    assert engine.runner.guard.count == before


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_vectors_are_those_of_each_text_alone(engine, mode):
    for text, vector in zip(TEXTS, embed_all(engine, TEXTS, pooling=mode), strict=True):
        assert vector.shape == (WIDTH,)
        np.testing.assert_allclose(vector, alone(text, mode), atol=1e-5)
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-5)


def test_concurrent_requests_share_batches(engine):
    before = engine.client.stats()

    async def every():
        with Blocked(engine) as blocked:
            first = asyncio.create_task(engine.client.embed("first", TEXTS[0]))
            assert await asyncio.to_thread(blocked.entered.wait, 60)
            rest = [asyncio.create_task(engine.client.embed(f"r{i}", TEXTS[0])) for i in range(6)]
            await until(lambda: engine.client.stats().num_waiting == 6, "six to wait")
            stats = engine.client.stats()
            blocked.go.set()
            await asyncio.gather(first, *rest)
            return stats, blocked.sizes

    stats, sizes = asyncio.run(every())
    assert sizes == [1, 4, 2]
    assert (stats.num_running, stats.num_waiting) == (1, 6)
    after = engine.client.stats()
    assert after.num_steps - before.num_steps == 3
    assert after.prompt_tokens - before.prompt_tokens == 7 * len(TEXTS[0])
    assert (after.num_waiting, after.num_running, engine.client.num_live) == (0, 0, 0)


def test_scores(scorer):
    model = tiny_encoder("BertForSequenceClassification")
    pairs = [TokenPair((1, *range(5, 5 + n), 2, 7, 8, 2), (0,) * (n + 2) + (1,) * 3) for n in (2, 9, 20)]
    scores = asyncio.run(scorer.client.score("s", pairs))
    assert scores.shape == (3,)
    for pair, score in zip(pairs, scores, strict=True):
        hidden, _ = hidden_of("BertForSequenceClassification", pair.token_ids, pair.segment_ids)
        assert float(score) == pytest.approx(sigmoid(model.classify(hidden, np.array([len(pair.token_ids)]))), abs=1e-5)
        without, _ = hidden_of("BertForSequenceClassification", pair.token_ids)
        segments_matter = sigmoid(model.classify(without, np.array([len(pair.token_ids)])))
        assert abs(segments_matter - float(score)) > 1e-4


def test_labels_of_one_text(scorer):
    """As probabilities and as they are, in company or alone."""
    model = tiny_encoder("BertForSequenceClassification")

    async def several():
        work = [scorer.client.classify(f"c{i}", text, raw=bool(i % 2)) for i, text in enumerate([*TEXTS, *TEXTS])]
        return await asyncio.gather(*work)

    for i, found in enumerate(asyncio.run(several())):
        text = [*TEXTS, *TEXTS][i]
        hidden, _ = hidden_of("BertForSequenceClassification", text)
        logit = model.classify(hidden, np.array([len(text)]))
        assert found.shape == (1,)
        assert float(found[0]) == pytest.approx(float(logit[0, 0]) if i % 2 else sigmoid(logit), abs=1e-5)


def sigmoid(logit_BL) -> float:
    return float(1 / (1 + np.exp(-np.asarray(logit_BL)[0, 0])))


def refused(coroutine) -> RequestError:
    with pytest.raises(RequestError) as caught:
        asyncio.run(coroutine)
    return caught.value


def test_what_a_model_does_not_do_is_said(engine, scorer):
    async def generate(client):
        async for _ in client.generate(EngineRequest("g", (1, 2), SamplingParams(max_tokens=1))):
            pass

    error = refused(generate(engine.client))
    assert error.kind is ErrorKind.INVALID_ARGUMENT
    assert error.message == "The model 'tiny-encoder' does not generate text."
    assert "no scores" in refused(engine.client.score("s", [TokenPair((1,), (0,))])).message
    assert "scores" in refused(scorer.client.embed("e", (1, 2))).message
    assert "labels" in refused(engine.client.classify("c", (1, 2))).message


def test_limits(engine):
    assert "41 tokens" in refused(engine.client.embed("e", (1,) * (LONGEST + 1))).message
    assert "0 tokens" in refused(engine.client.embed("e", ())).message
    assert "pooling" in refused(engine.client.embed("e", (1,), pooling="max")).message


def test_full_queue_and_ids_in_use():
    engine = tiny_encoder_engine(EngineConfig(max_num_queued_reqs=2, progress=False))

    async def run():
        with Blocked(engine) as blocked:
            tasks = [asyncio.create_task(engine.client.embed("r0", TEXTS[0]))]
            assert await asyncio.to_thread(blocked.entered.wait, 60)
            tasks += [asyncio.create_task(engine.client.embed(f"r{i}", TEXTS[0])) for i in (1, 2)]
            await asyncio.sleep(0)
            with pytest.raises(RequestError) as full:
                await engine.client.embed("r3", TEXTS[0])
            tasks[1].cancel()  # its place is free again
            await asyncio.gather(tasks[1], return_exceptions=True)
            with pytest.raises(RequestError) as twice:
                await engine.client.embed("r2", TEXTS[0])
            tasks[1] = asyncio.create_task(engine.client.embed("r4", TEXTS[0]))
            await asyncio.sleep(0)
            assert await engine.client.abort("r2")
            blocked.go.set()
            return full.value, twice.value, await asyncio.gather(*tasks, return_exceptions=True)

    full, twice, results = asyncio.run(run())
    engine.shutdown()
    assert (full.kind, full.code) == (ErrorKind.RESOURCE_EXHAUSTED, "queue_full")
    assert twice.param == "request_id"
    assert [type(r) for r in results] == [np.ndarray, np.ndarray, RequestError]


def test_death_and_shutdown_end_what_runs():
    for die in (True, False):
        engine = tiny_encoder_engine()

        async def run(engine=engine, die=die):
            with Blocked(engine) as blocked:
                task = asyncio.create_task(engine.client.embed("r", TEXTS[0]))
                assert await asyncio.to_thread(blocked.entered.wait, 60)
                waiting = asyncio.create_task(engine.client.embed("w", TEXTS[0]))
                await asyncio.sleep(0)
                if die:
                    blocked.run = lambda texts: sys.exit()  # as only what means the whole process
                    blocked.go.set()
                    assert await asyncio.to_thread(engine.died.wait, 60)
                else:
                    stopping = asyncio.create_task(asyncio.to_thread(engine.shutdown))
                    await until(lambda: engine.client.draining, "the shutdown to begin")
                    blocked.go.set()
                    await stopping
                return await asyncio.gather(task, waiting, return_exceptions=True)

        first, second = asyncio.run(run())
        assert engine.client.healthy is not die
        assert isinstance(second, RequestError)
        assert second.kind is (ErrorKind.INTERNAL if die else ErrorKind.UNAVAILABLE)
        assert isinstance(first, RequestError if die else np.ndarray | RequestError)
        late = refused(engine.client.embed("late", TEXTS[0]))
        assert late.kind is (ErrorKind.INTERNAL if die else ErrorKind.UNAVAILABLE)
        engine.shutdown()


def test_a_batch_that_is_stuck_can_be_seen_and_given_up():
    engine = tiny_encoder_engine()

    async def run():
        assert engine.busy_since is None
        with Blocked(engine) as blocked:
            task = asyncio.create_task(engine.client.embed("r", TEXTS[0]))
            assert await asyncio.to_thread(blocked.entered.wait, 60)
            assert engine.busy_since is not None and engine.busy_since <= time.monotonic()
            engine.declare_dead(TimeoutError("stuck"))
            (result,) = await asyncio.gather(task, return_exceptions=True)
            blocked.go.set()
            return result

    result = asyncio.run(run())
    assert isinstance(result, RequestError) and result.kind is ErrorKind.INTERNAL
    assert isinstance(engine.failure, TimeoutError) and not engine.client.healthy
    engine.shutdown()


def test_a_result_that_is_no_number_concerns_its_request_alone(engine):
    async def run():
        with Blocked(engine) as blocked:

            def spoilt(texts):
                out = np.array(blocked.real(texts))
                out[0] = np.nan
                return out

            blocked.run = spoilt
            tasks = [asyncio.create_task(engine.client.embed(f"n{i}", TEXTS[0])) for i in range(2)]
            await asyncio.sleep(0)
            blocked.go.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return results, blocked.sizes

    results, sizes = asyncio.run(run())
    assert isinstance(results[0], RequestError)
    assert results[0].kind is ErrorKind.INTERNAL
    assert isinstance(results[1], np.ndarray) == (sizes == [2])
    assert engine.client.healthy


def test_its_own_thread_has_run_a_batch_before_it_is_ready(monkeypatch):
    seen, run = [], tiny_runner("embed").run
    monkeypatch.setattr(
        tiny_runner("embed"), "run", lambda texts: seen.append(threading.current_thread().name) or run(texts)
    )
    engine = tiny_encoder_engine()
    assert seen == ["jaxserve-encoder"]
    assert (engine.client.stats().num_steps, engine.client.stats().prompt_tokens) == (0, 0)
    engine.shutdown()


def test_a_runner_that_fails_at_once_fails_the_start(monkeypatch):
    def fail(texts):
        raise ValueError("no device")

    monkeypatch.setattr(tiny_runner("embed"), "run", fail)
    with pytest.raises(ValueError, match="no device"):
        tiny_encoder_engine()
