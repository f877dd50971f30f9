"""Prompts with images that one engine computes and another goes on with, behind a gateway: transformers' tokens, and the engine
that decodes encodes no image whose places came as pages.

Slow: two whole engines. What travels is compared without a model in tests/serving/gateway/test_media.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import io

import httpx
import pytest

from models.loading.source import resolve
from serving.boot import startup
from serving.engine.api.config import EngineConfig
from serving.frontends.app import serve_http
from serving.frontends.grpc.client import RemoteEngineClient
from serving.frontends.grpc.server import GrpcServer
from serving.gateway import Pool
from serving.gateway.flags import parse
from serving.gateway.media import media_of
from serving.gateway.prefills import Prefills
from serving.service import TextService
from tests.models import tiny_vision
from tests.serving.media.images import part, uri
from tests.serving.media.test_images import LARGE, SMALL, turn

pytestmark = pytest.mark.slow
STEPS = tiny_vision.STEPS


@pytest.fixture(scope="module", params=["Gemma 3", "Qwen2.5-VL"])
def engines(request, tmp_path_factory):
    """(family, transformers' model, its folder, the engine that computes prompts, the one that decodes)."""
    folder = tmp_path_factory.mktemp("apart") / "model"
    model = tiny_vision.save(request.param, folder)
    page = 4096 * model.config.get_text_config().num_hidden_layers
    started = [
        startup.start(
            EngineConfig(
                model=str(folder), role=role, dtype="float32", quantization="none", max_model_len=160, max_num_seqs=4,
                max_num_batched_tokens=32, kv_cache_memory=40 * page, mm_encoder_cache_gb=0.0, progress=False,
            )
        )
        for role in ("prefill", "decode")
    ]  # fmt: skip
    yield request.param, model, folder, *started
    for one in started:
        one.engine.runner.guard.check()
        one.engine.shutdown()


@contextlib.asynccontextmanager
async def gateway(folder, *started):
    """A client of a gateway that has the first engine compute prompts for the second; and its prefills."""
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for one in started:
            server = GrpcServer("127.0.0.1", 0)
            stack.push_async_callback(server.stop, 0.0)
            await server.start()
            await server.serve(one.service())
            clients.append(await RemoteEngineClient.connect(f"127.0.0.1:{server.port}"))
            stack.push_async_callback(clients[-1].close)
            address = f"127.0.0.1:{server.port}"
            if len(clients) == 1:
                helper = address
        pool = Pool(clients[1:])
        pool.prefills = Prefills("always", 16)
        pool.prefills.add(helper, clients[0], pool.info().model_id)
        text = started[0].text
        media = media_of(parse(["--target", "127.0.0.1:1"]), pool.info(), resolve(str(folder)))
        service = TextService(pool, text.tokenizer, text.chat_template, model_id=pool.info().model_id, media=media)
        http = await serve_http(service, port=0)
        stack.push_async_callback(http.stop)
        web = httpx.AsyncClient(base_url=http.url, timeout=300)
        yield await stack.enter_async_context(web), pool.prefills


def as_sent(messages):
    """Pictures as a client sends them over HTTP."""

    def sent(one):
        if one["type"] != "image":
            return one
        out = io.BytesIO()
        one["image"].save(out, "PNG")
        return part(uri(out.getvalue()))

    return [{**message, "content": [sent(one) for one in message["content"]]} for message in messages]


async def test_images_of_prompts_computed_elsewhere(engines):
    name, model, folder, first, second = engines
    turns = [
        turn(10, LARGE, *range(20, 40)),
        turn(10, tiny_vision.picture(333, 217, 9), *range(20, 40)),  # the same tokens
        turn(50, SMALL, 51, SMALL, *range(60, 78)),
        turn(30, LARGE),  # pages end inside the image: its last places are computed where it runs
        turn(*range(40, 60)),
    ]
    stores = [one.engine.scheduler.kv.managers[0].media for one in (first, second)]
    async with gateway(folder, first, second) as (web, prefills):

        async def ask(messages):
            body = {
                "messages": as_sent(messages), "max_tokens": STEPS, "min_tokens": STEPS, "temperature": 0,
                "return_token_ids": True,
            }  # fmt: skip
            reply = await web.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            return reply.json()

        for at, (messages, ids, images, videos) in enumerate(turns):
            encoded = [store.misses for store in stores]
            found = await ask(messages)
            prompt, tokens = tiny_vision.expected(name, model, ids, images, videos)
            assert found["prompt_token_ids"] == prompt
            assert found["choices"][0]["token_ids"] == tokens
            came = found["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert came == (len(prompt) - 1) // 16 * 16, "all that travels came"
            here, there = (store.misses - before for store, before in zip(stores, encoded, strict=True))
            assert here + (not images) > 0 and there == (at == 3), (at, here, there)
        again = await asyncio.gather(*(ask(one[0]) for one in turns))
        assert [one["prompt_token_ids"] for one in again] == [
            tiny_vision.expected(name, model, *one[1:])[0] for one in turns
        ]
        assert prefills.decisions["apart"] >= len(turns) and not prefills.failures
    for one in (first, second):
        one.engine.call(one.engine.scheduler.pool.check)
