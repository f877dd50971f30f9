"""Adapters over HTTP and gRPC: loaded, listed, chosen, for whom; what routers read; who finds those that nobody loaded."""

from __future__ import annotations

import asyncio
import json

import grpc
import httpx
import pytest

from proto.jaxserve.v1 import control_pb2, sampling_pb2
from proto.jaxserve.v1 import inference_pb2 as pb
from serving.batch import run_batch
from serving.boot.lora_modules import FolderResolver
from serving.engine.api.adapters import AdapterLoad, LoRARequest
from serving.frontends.app import create_app, serve_http
from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
from serving.gateway import Pool
from serving.metrics import MeteredClient
from serving.service import TextService
from serving.service.adapters import plain_model
from tests.mock_engine import until
from tests.models.adapters.make import write_adapter
from tests.serving.adapters.conftest import ADMIN, ANNA, BERT, bearer, metadata, serving

GREEDY = sampling_pb2.SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


async def said(running, key=ADMIN, **fields) -> str:
    """A completion over gRPC."""
    request = pb.GenerateRequest(text="w3 w4 w5", sampling_params=GREEDY, **fields)
    return "".join([m.text async for m in running.inference.Generate(request, metadata=metadata(key))])


async def test_both_protocols_load_list_choose_and_unload(started, folder):
    async with serving(started, folder) as running:
        reply = await running.load("one", "one")
        assert (reply.status_code, reply.text) == (200, "Success: LoRA adapter 'one' added successfully.")
        loaded = await running.control.LoadAdapter(
            control_pb2.LoadAdapterRequest(name="team/two", path="two"), metadata=metadata(ADMIN)
        )
        assert (loaded.adapter.rank, loaded.adapter.num_matrices, loaded.adapter.own_text) == (8, 14, False)

        cards = await running.models(ANNA)
        base = running.service.model_id
        assert list(cards) == [base, "one", "team/two"]
        assert cards[base]["parent"] is None and cards["one"]["parent"] == cards["team/two"]["parent"] == base
        assert cards["one"]["root"] == str(folder / "one")
        listed = await running.control.ListAdapters(control_pb2.ListAdaptersRequest(), metadata=metadata(ANNA))
        assert [one.name for one in listed.adapters] == ["one", "team/two"]
        info = await running.control.GetModelInfo(control_pb2.GetModelInfoRequest(model="one"), metadata=metadata(ANNA))
        assert (info.id, info.parent) == ("one", base)

        texts = {name: await running.text(name, key=ANNA) for name in (base, "one", "team/two")}
        assert len(set(texts.values())) == 3, "each says something else"
        assert await said(running, adapter="one") == await said(running, model="one") == texts["one"]
        assert await said(running, adapter="team/two", model="default") == texts["team/two"]
        assert await said(running) == texts[base]
        with pytest.raises(grpc.aio.AioRpcError, match="name two different ones"):
            await said(running, adapter="one", model="team/two")

        body = {"model": "one", "messages": [{"role": "user", "content": "w3"}], "max_tokens": 3}
        assert (
            (await running.post("/v1/chat/completions", body, ANNA)).json()["error"]["message"].startswith("This model")
        )
        vectors = [
            (await running.post("/v1/embeddings", {"model": name, "input": "w3 w4"}, ANNA)).json()["data"][0][
                "embedding"
            ]
            for name in (base, "one")
        ]
        assert vectors[0] != vectors[1], "vectors are the adapter's too"

        assert (await running.unload("one")).text == "Success: LoRA adapter 'one' removed successfully."
        await running.control.UnloadAdapter(control_pb2.UnloadAdapterRequest(name="team/two"), metadata=metadata(ADMIN))
        assert list(await running.models(ANNA)) == [base]
        for gone in ("one", "team/two"):
            reply = await running.post("/v1/completions", {"model": gone, "prompt": "w3"}, ANNA)
            assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.control.UnloadAdapter(control_pb2.UnloadAdapterRequest(name="one"), metadata=metadata(ADMIN))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_adapter_of_some_keys_is_there_for_nobody_else(started, folder):
    async with serving(started, folder) as running:
        assert (await running.load("annas", "one", tenants=["key-1"])).status_code == 200
        assert (await running.load("all", "two")).status_code == 200
        base = running.service.model_id
        assert list(await running.models(ANNA)) == [base, "annas", "all"]
        assert list(await running.models(BERT)) == [base, "all"]
        assert list(await running.models(ADMIN)) == [base, "annas", "all"]
        for key, names in ((ANNA, ["annas", "all"]), (BERT, ["all"])):
            listed = await running.control.ListAdapters(control_pb2.ListAdaptersRequest(), metadata=metadata(key))
            assert [one.name for one in listed.adapters] == names
        assert await running.text("annas", key=ANNA) != await running.text(base, key=ANNA)
        unknown = (await running.post("/v1/completions", {"model": "annas", "prompt": "w3"}, BERT)).json()["error"]
        nothing = (await running.post("/v1/completions", {"model": "annex", "prompt": "w3"}, BERT)).json()["error"]
        assert unknown["message"].replace("annas", "annex") == nothing["message"], "that it is there is not told"
        for path, body in (
            ("/tokenize", {"prompt": "w3"}), ("/detokenize", {"tokens": [3]}), ("/v1/embeddings", {"input": "w3"}),
        ):  # fmt: skip
            assert (await running.post(path, {"model": "annas", **body}, BERT)).status_code == 404, path
            assert (await running.post(path, {"model": "annas", **body}, ANNA)).status_code == 200, path
        assert (await running.http.get("/v1/models/annas", headers=bearer(BERT))).status_code == 404
        with pytest.raises(grpc.aio.AioRpcError, match="does not exist"):
            await said(running, BERT, adapter="annas")


async def test_routers_read_which_adapters_are_in_use(started, folder):
    def sample(text: str) -> str:
        (line,) = [line for line in text.splitlines() if line.startswith("jaxserve:lora_requests_info{")]
        return line

    async with serving(started, folder) as running:
        await running.load("one", "one")
        await running.load("two", "two")
        idle = sample((await running.http.get("/metrics", headers=bearer(ADMIN))).text)
        assert 'max_lora="2"' in idle and 'running_lora_adapters=""' in idle and 'waiting_lora_adapters=""' in idle
        load, engine = running.service.adapters.client.load_now, started.engine.lifecycle
        await asyncio.to_thread(engine.pause)  # so that they wait for as long as is looked
        asked = [asyncio.create_task(running.text(name, key=ANNA, max_tokens=100)) for name in ("one", "two", "one")]
        await until(lambda: load() == AdapterLoad((), ("one", "two"), 2), seconds=60)
        text = sample((await running.http.get("/metrics", headers=bearer(ADMIN))).text)
        assert 'running_lora_adapters=""' in text and 'waiting_lora_adapters="one,two"' in text
        await asyncio.to_thread(engine.resume)
        await until(lambda: load().running, seconds=60)
        await asyncio.gather(*asked)
        await until(lambda: load().running == load().waiting == (), seconds=60)


class Installed:
    """What a package's resolver may be: it finds one adapter, and fails on another."""

    def __init__(self, path) -> None:
        self.path, self.asked = path, []

    async def resolve(self, base_model, name):
        self.asked.append(name)
        if name == "broken":
            raise RuntimeError("no such bucket")
        return LoRARequest(name, 0, str(self.path), tenants=("key-1",)) if name == "found" else None


async def test_resolvers_find_what_nobody_loaded(started, folder, tmp_path):
    elsewhere = Installed(write_adapter(tmp_path / "elsewhere", seed=5))
    async with serving(started, folder) as running:
        running.service.adapters.resolvers = (FolderResolver(folder), elsewhere)
        base = running.service.model_id
        texts = await asyncio.gather(*(running.text("two", key=ANNA) for _ in range(4)))
        assert len(set(texts)) == 1 and texts[0] != await running.text(base, key=ANNA)
        assert elsewhere.asked == [], "the first that knows it is enough, and it is read once"
        assert await running.text("found", key=ANNA) not in texts
        assert (await running.post("/v1/completions", {"model": "found", "prompt": "w3"}, BERT)).status_code == 404
        for name in ("nothing", "broken", "../one", "/one", "one/../two", "one/"):
            reply = await running.post("/v1/completions", {"model": name, "prompt": "w3"}, ANNA)
            assert reply.status_code == 404, name
        assert elsewhere.asked == ["found", "nothing", "broken"], "what can be no name is not looked for"
        assert set(await running.models(ADMIN)) == {base, "two", "found"}


async def test_a_gateway_serves_what_its_engines_have(started, folder):
    async with serving(started, folder) as running:
        await running.load("one", "one")
        await running.load("annas", "two", tenants=["key-1"])
        client = await RemoteEngineClient.connect(running.target, api_key=ADMIN, poll_s=0.1)
        behind = TextService(
            MeteredClient(Pool([client])),  # type: ignore[arg-type]
            running.service.tokenizer,
            model_id=running.service.model_id,
            grammar_compiler=RemoteGrammars(),  # type: ignore[arg-type]
        )
        gateway = await serve_http(behind, port=0)
        try:
            async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:

                async def text(model):
                    body = {"model": model, "prompt": "w3 w4 w5", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
                    return (await http.post("/v1/completions", json=body)).json()["choices"][0]["text"]

                assert await text("one") == await running.text("one", key=ANNA) != await text("default")
                cards = (await http.get("/v1/models")).json()["data"]
                assert [card["id"] for card in cards] == [behind.model_id, "one"], "who asks here has no key"
                vectors = [
                    (await http.post("/v1/embeddings", json={"model": m, "input": "w3"})).json()["data"][0]["embedding"]
                    for m in ("default", "one")
                ]
                assert vectors[0] != vectors[1]
                await running.unload("one")
                await until(lambda: behind.adapters.find("one") is None)
                assert (await http.post("/v1/completions", json={"model": "one", "prompt": "w3"})).status_code == 404
        finally:
            await gateway.stop(0.0)
            await client.close()


async def test_a_batch_names_adapters_line_by_line(started, folder, tmp_path):
    async with serving(started, folder) as running:
        await running.load("one", "one")
        await running.load("two", "two")
        names = [running.service.model_id, "one", "two", "nobody"]
        body = {"prompt": "w3 w4 w5", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        lines = [
            {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {**body, "model": name}} for name in names
        ]  # fmt: skip
        source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        await run_batch(create_app(running.service, page=False), source, target, concurrency=4)
        replies = {entry["custom_id"]: entry["response"] for entry in map(json.loads, target.read_text().splitlines())}
        assert replies["nobody"]["status_code"] == 404
        for name in names[:3]:
            assert replies[name]["body"]["choices"][0]["text"] == await running.text(name, key=ANNA)


def test_copies_of_a_model_have_one_name():
    copies = ("-unsloth-bnb-4bit", "-bnb-4bit", "/")
    names = [f"unsloth/Llama-3.2-1B-Instruct{ending}" for ending in copies]
    assert {plain_model(name) for name in names} == {plain_model("meta-llama/Llama-3.2-1B-Instruct")}
    assert plain_model("Qwen3-8B-AWQ") == plain_model("Qwen/Qwen3-8B") != plain_model("Qwen/Qwen3-4B")
