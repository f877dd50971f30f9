"""What an adapter, its path, its name and its times of coming and going must not be able to do."""

from __future__ import annotations

import asyncio
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from serving.access import Access, KeyRing
from tests.mock_engine import until
from tests.models.adapters.make import write_adapter
from tests.serving.adapters.conftest import ADMIN, ANNA, copied, serving

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def edit(folder, **tensors):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **tensors}, path)


async def refused(running, path, word, status=400):
    reply = await running.load("bad", str(path))
    assert reply.status_code == status, reply.text
    assert word in reply.json()["error"]["message"], reply.text
    assert "bad" not in await running.models(ADMIN)


async def test_paths_out_of_the_folder(started, folder, tmp_path):
    outside = write_adapter(tmp_path / "outside")
    (folder / "link").symlink_to(outside)
    half = copied(folder / "one", folder / "half")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        copy = copied(folder / "one", folder / f"linked-{name}")
        (copy / name).unlink()
        (copy / name).symlink_to(outside / name)
    (half / "chat_template.jinja").symlink_to("/etc/hostname")
    async with serving(started, folder) as running:
        for path in ("../outside", str(outside), "/", "link", "one/../../outside", "\0", "x" * 5000):
            reply = await running.load("bad", path)
            assert reply.status_code in (400, 403), (path, reply.text)
        for path in ("linked-adapter_model.safetensors", "linked-adapter_config.json", "half"):
            await refused(running, path, "leads out of the folder")
        assert (await running.load("good", str(folder / "one"))).status_code == 200, "absolute, but below it"
    async with serving(started, None) as running:
        assert (await running.load("one", str(folder / "one"))).status_code == 403, "without --lora-folder none may"


async def test_only_admins_load_and_unload(started, folder):
    for access, key in ((Access(), None), (Access(KeyRing.of([ANNA])), ANNA), (None, ANNA)):
        async with serving(started, folder, *(() if access is None else (access,))) as running:
            assert (await running.load("one", "one", key)).status_code == 403
            assert (await running.post("/v1/unload_lora_adapter", {"lora_name": "one"}, key)).status_code == 403


async def test_files_that_are_no_adapters_of_this_model(started, folder):
    made = {name: copied(folder / "one", folder / name) for name in ("shape", "nan", "inf", "left", "pickle", "cut")}
    stored = load_file(made["shape"] / "adapter_model.safetensors")
    a, b = stored[f"{Q}.lora_A.weight"], stored[f"{Q}.lora_B.weight"]
    edit(made["shape"], **{f"{Q}.lora_A.weight": np.ascontiguousarray(a[:, :-1])})
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        bad = b.copy()
        bad[3, 1] = value
        edit(made[name], **{f"{Q}.lora_B.weight": bad})
    edit(made["left"], **{"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": a,
                          "base_model.model.model.layers.9.mlp.up_proj.lora_B.weight": b})  # fmt: skip
    weights = made["pickle"] / "adapter_model.safetensors"
    weights.with_name("adapter_model.bin").write_bytes(pickle.dumps({"x": 1}))
    weights.unlink()
    cut = made["cut"] / "adapter_model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    write_adapter(folder / "rank", rank=9)
    (folder / "renamed").mkdir()
    (folder / "renamed" / "adapter_model.safetensors").write_bytes(pickle.dumps({"x": 1}))
    config = json.loads((folder / "one" / "adapter_config.json").read_text())
    (folder / "renamed" / "adapter_config.json").write_text(json.dumps(config))
    async with serving(started, folder) as running:
        await refused(running, "shape", "[96, 47]; the served model's is [96, 48]")
        await refused(running, "nan", "not finite")
        await refused(running, "inf", "not finite")
        await refused(running, "left", "layers.9")
        await refused(running, "rank", "rank 9; --max-lora-rank is 8")
        await refused(running, "pickle", "may run code")
        await refused(running, "renamed", "renamed")
        await refused(running, "cut", "cut")
        await refused(running, "nowhere", "not a PEFT adapter")


@pytest.mark.parametrize(
    "name",
    ["", "/", "a/", "/a", "a//b", "../a", "a/../b", ".hidden", "a b", "a\n", "a\0", "ä", "a" * 257, "default", "-x", "a\\b", "%2e"],
)  # fmt: skip
async def test_names_that_are_none(started, folder, name):
    async with serving(started, folder) as running:
        reply = await running.load(name, "one")
        assert reply.status_code == 400 and "lora_name" in json.dumps(reply.json()), reply.text


async def test_names_with_slashes_are_names(started, folder):
    async with serving(started, folder) as running:
        assert (await running.load("team/one:v1.2", "one")).status_code == 200
        assert (await running.text("team/one:v1.2", key=ANNA)) != (await running.text("default", key=ANNA))
        card = await running.http.get("/v1/models/team/one:v1.2", headers={"Authorization": f"Bearer {ANNA}"})
        assert card.json()["id"] == "team/one:v1.2"


async def test_two_loads_at_once(started, folder):
    async with serving(started, folder) as running:
        replies = await asyncio.gather(*(running.load("same", path) for path in ("one", "two") * 4))
        assert sorted(reply.status_code for reply in replies) == [200] + [400] * 7
        assert "already" in next(r for r in replies if r.status_code == 400).json()["error"]["message"]
        replies = await asyncio.gather(*(running.load("same", path, load_inplace=True) for path in ("one", "two") * 4))
        assert {reply.status_code for reply in replies} == {200}
        replies = await asyncio.gather(*(running.load(f"n{i}", "one") for i in range(6)))
        assert {reply.status_code for reply in replies} == {200}, "of other names all are taken"
        texts = {await running.text(f"n{i}", key=ANNA) for i in range(6)}
        assert len(texts) == 1, "one content, one adapter"


async def test_what_runs_ends_with_the_adapter_that_it_began_with(started, folder):
    async with serving(started, folder) as running:
        await running.load("one", "one")
        alone = await running.text("one", key=ANNA, max_tokens=100)
        for act in ("unload", "replace"):
            asked = asyncio.create_task(running.text("one", key=ANNA, max_tokens=100))
            load = running.service.adapters.client.load_now
            await until(lambda load=load: "one" in load().running, seconds=60)
            if act == "unload":
                assert (await running.unload("one")).status_code == 200
                gone = await running.post("/v1/completions", {"model": "one", "prompt": "w3"}, ANNA)
                assert gone.status_code == 404
                await running.load("one", "two")
                assert await running.text("one", key=ANNA) != alone[: len(alone) // 4]
                await running.load("one", "one", load_inplace=True)
            else:
                assert (await running.load("one", "two", load_inplace=True)).status_code == 200
                other = await running.text("one", key=ANNA, max_tokens=100)
                assert other != alone, "pages are found by the content, never by the name"
                await running.load("one", "one", load_inplace=True)
            assert await asked == alone, act


async def test_files_that_change_behind_the_server_are_noticed(started, folder):
    async with serving(started, folder) as running:
        for name in ("one", "two"):
            await running.load(name, name)
        copied(folder / "one", folder / "three")
        edit(folder / "three", **{f"{Q}.lora_B.weight": np.ones((96, 4), np.float32)})
        await running.load("three", "three")  # host memory has room for two: "one" has to be read again
        weights = folder / "one" / "adapter_model.safetensors"
        weights.write_bytes((folder / "three" / "adapter_model.safetensors").read_bytes())
        reply = await running.post("/v1/completions", {"model": "one", "prompt": "w3"}, ANNA)
        assert reply.status_code == 404 and "changed" in reply.json()["error"]["message"]


async def test_a_thousand_loads_leave_nothing_behind(started, folder):
    engine = started.engine
    async with serving(started, folder) as running:
        adapters = running.service.adapters
        names = ("one", "two")
        for i in range(500):
            for name in names:
                adapters.load(f"{name}-{i}", str(folder / name))
            if i % 100 == 0:
                await asyncio.gather(*(running.text(f"{name}-{i}", key=ANNA) for name in names))
            for name in names:
                await asyncio.to_thread(adapters.unload, f"{name}-{i}")
        await until(lambda: engine.runner.adapters.num_kept == 0, seconds=30)
        slots = engine.scheduler.adapters
        assert adapters.client.infos() == [] and adapters._voices == {}
        assert slots.running == slots.waiting == frozenset() and slots.num_free == 2
        engine.runner.guard.check()
