"""A TextService over RemoteEngineClient over our gRPC says what one over the engine itself says."""

import contextlib
import dataclasses

import pytest

from serving.engine.api.peers.stats import REASONS, TransferStats
from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.engine.api.types import EngineStats
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.service import GenerateInput, collect
from tests.mock_engine import MockEngine, mock_service, until


@contextlib.asynccontextmanager
async def gateway(serve, engine, **kwargs):
    async with serve(engine, **kwargs) as s:
        client = await RemoteEngineClient.connect(s.target, poll_s=0.02)
        try:
            yield s, mock_service(client, grammar_compiler=RemoteGrammars())
        finally:
            await client.close()


async def ask(service, given, params):
    prepared = await service.prepare(given, params)
    return await collect(prepared, service.generate(prepared))


PARAMS = {
    "plain": SamplingParams(max_tokens=20),
    "stop string": SamplingParams(max_tokens=200, stop=["o wo"]),
    "several": SamplingParams(max_tokens=20, n=3, seed=7),
    "logprobs": SamplingParams(max_tokens=5, logprobs=3, prompt_logprobs=1),
    "stop token": SamplingParams(max_tokens=200, stop_token_ids=[ord("w")]),
    "end of text": SamplingParams(max_tokens=300),
}


@pytest.mark.parametrize("case", PARAMS)
async def test_same_results_as_the_engine_itself(serve, case):
    given = GenerateInput(text="hello world", request_id="same")
    direct = await ask(mock_service(MockEngine()), given, PARAMS[case])
    async with gateway(serve, MockEngine()) as (_, service):
        remote = await ask(service, given, PARAMS[case])
    for result in (direct, remote):
        result.metrics = None
    assert remote == direct


async def test_the_request_arrives_whole(serve):
    given = GenerateInput(
        token_ids=[1, 2, 3], priority=-5, cache_salt="salt", tenant="me", timeout_s=60, ttft_timeout_s=30
    )
    params = SamplingParams(temperature=0.7, top_k=3, logit_bias={4: 0.5}, bad_words=["no"], stop=["x"], max_tokens=2)
    async with gateway(serve, MockEngine("ab")) as (s, service):
        await ask(service, given, params)
    request = s.engine.requests[0]
    assert request.prompt_token_ids == (1, 2, 3)
    assert (request.priority, request.cache_salt, request.tenant) == (-5, "salt", "me")
    assert 55 < request.deadline - request.arrival_time <= 60
    assert 25 < request.ttft_deadline - request.arrival_time <= 30
    assert (request.params.temperature, request.params.top_k, request.params.logit_bias) == (0.7, 3, {4: 0.5})
    assert request.params.stop_strings == () and request.bad_words_token_ids, "text stays on the gateway's side"


async def test_grammars_go_by_their_source(serve):
    class Compiler:
        seen = None

        def compile(self, grammar):
            self.seen = grammar
            return lambda: None

    compiler = Compiler()
    async with gateway(serve, MockEngine("a"), grammar_compiler=compiler) as (_, service):
        grammar = StructuredOutputs(choice=("a", "b"))
        await ask(service, GenerateInput(text="x"), SamplingParams(structured_outputs=grammar))
    assert compiler.seen == grammar


async def test_errors_keep_their_kind_field_and_hint(serve):
    async with gateway(serve, MockEngine("word ", step_s=0.005, max_live=0)) as (s, service):
        with pytest.raises(RequestError) as caught:
            await ask(service, GenerateInput(text="x"), SamplingParams())
        assert (caught.value.kind, caught.value.retry_after_s) == (ErrorKind.RESOURCE_EXHAUSTED, 1.0)
        s.service.start_draining()
        await until(lambda: not service.client.healthy)
        with pytest.raises(RequestError) as caught:
            await ask(service, GenerateInput(text="x"), SamplingParams())
        assert caught.value.kind is ErrorKind.UNAVAILABLE


async def test_dropping_the_stream_and_aborting_reach_the_engine(serve):
    engine = MockEngine("word ", step_s=0.005, max_model_len=10_000)
    async with gateway(serve, engine) as (_, service):
        endless = SamplingParams(ignore_eos=True, max_tokens=9000)
        prepared = await service.prepare(GenerateInput(text="x"), endless)
        async with contextlib.aclosing(service.generate(prepared)) as outputs:
            await anext(outputs)
            assert len(engine.live) == 1
        await until(lambda: not engine.live)
        prepared = await service.prepare(GenerateInput(text="x", request_id="mine"), endless)
        outputs = service.generate(prepared)
        await anext(outputs)
        assert await service.abort("mine")
        last = [output async for output in outputs][-1]
        assert last.finish_reason.value == "abort"


async def test_nobody_there():
    with pytest.raises(RequestError) as caught:
        await RemoteEngineClient.connect("127.0.0.1:1", timeout_s=0.2)
    assert caught.value.kind in (ErrorKind.UNAVAILABLE, ErrorKind.DEADLINE_EXCEEDED)


async def test_a_servers_counters_arrive_whole(serve):
    """All but those that the wire has no place for."""
    absent = {"num_failed_steps", "num_nonfinite", "last_step_s", "host_step_s", "expert_loads"} | {
        "num_deferred",
        "step_tokens",
        "running_adapters",
        "waiting_adapters",
    }
    names = [field.name for field in dataclasses.fields(EngineStats) if field.name not in absent]
    stats = EngineStats(**{name: i + 1 for i, name in enumerate(names)})
    names = [field.name for field in dataclasses.fields(TransferStats) if field.name != "fallbacks"]
    transfers = TransferStats(**{name: i + 1 for i, name in enumerate(names)}, fallbacks=tuple(range(len(REASONS))))
    stats = dataclasses.replace(stats, accepted_per_pos=(3, 1), transfers=transfers)
    engine = MockEngine()
    engine.stats = lambda: stats
    async with gateway(serve, engine) as (_, service):
        assert service.client.stats() == stats
