"""Which targets there are: flags, names with many addresses, a file that changes; and engines that come and go."""

from __future__ import annotations

import asyncio
import os
import socket

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.gateway import Pool
from serving.gateway.connecting import Connector
from serving.gateway.discovery import Discovery, check_target
from tests.mock_engine import MockEngine, until


@pytest.mark.parametrize(
    "wrong", ["", "host", "host:", "host:0", "host:99999", "a b:1", "http://host:1", "dns:///host"]
)
def test_what_is_no_target_is_refused(wrong):
    with pytest.raises(ValueError, match="no target"):
        check_target(wrong)


def test_fixed_targets_do_not_change():
    assert not Discovery(["a:1", "[::1]:2"]).changes
    assert Discovery(["dns:///a:1"]).changes


async def test_a_name_stands_for_all_its_addresses(monkeypatch):
    answers: list = [["10.0.0.1", "10.0.0.2"], ["10.0.0.2", "fd00::1"], OSError("no such name")]

    async def resolve(host, port, **_):
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise socket.gaierror(answer)
        assert (host, port) == ("engines", 50051)
        return [(0, 0, 0, "", (a, port)) for a in answer]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve, raising=False)
    found = Discovery(["dns:///engines:50051", "fixed:1"])
    assert await found.names() == {"10.0.0.1:50051": "engines", "10.0.0.2:50051": "engines", "fixed:1": None}
    later = {"10.0.0.2:50051": "engines", "[fd00::1]:50051": "engines", "fixed:1": None}
    assert await found.names() == later
    assert await found.names() == later  # the name does not resolve: as before


async def test_a_file_is_read_again_when_it_changes(tmp_path, caplog):
    path = tmp_path / "targets"
    found = Discovery([], path)
    assert dict(await found.names()) == {} and "cannot be used" in caplog.text
    path.write_text("a:1\n# none\n\nb:2  # the second\n")
    assert list(await found.names()) == ["a:1", "b:2"]
    path.write_text("b:2\nnonsense\n")
    assert list(await found.names()) == ["a:1", "b:2"] and "'nonsense' is no target" in caplog.text
    other = tmp_path / "new"  # as a ConfigMap is changed: another file takes the name
    other.write_text("c:3\n")
    os.replace(other, path)
    assert list(await found.names()) == ["c:3"]
    path.unlink()
    assert list(await found.names()) == ["c:3"]


class _Client(MockEngine):
    closed = False

    async def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("in_a_file", [False, True])
async def test_engines_that_are_late_are_taken_although_nobody_waits_for_them(tmp_path, in_a_file):
    late = asyncio.Event()
    found: list[str] = []

    async def connect(name, **_):
        if name == "b:1":
            await late.wait()
        return _Client()

    path = tmp_path / "targets"
    path.write_text("a:1\nb:1\n")
    discovery = Discovery([], path) if in_a_file else Discovery(["a:1", "b:1"])
    connector = Connector(discovery, lambda name, client: found.append(name), connect=connect, look_s=0.01)
    await connector.start()
    waiting = asyncio.create_task(connector.settled())
    await until(lambda: found == ["a:1"])
    waiting.cancel()  # the gateway has one engine, and serves
    await asyncio.gather(waiting, return_exceptions=True)
    late.set()
    await until(lambda: found == ["a:1", "b:1"], "the second engine")
    path.write_text("a:1\nb:1\nc:1\n")
    if in_a_file:
        await until(lambda: found == ["a:1", "b:1", "c:1"], "what the file says later")
    await connector.close()


async def test_engines_come_and_go_and_what_runs_ends_well(tmp_path):
    path = tmp_path / "targets"
    path.write_text("a:1\nb:1\n")
    engines = {f"{name}:1": _Client(reply="x" * 40, step_s=0.002) for name in "abc"}
    pools: list[Pool] = []
    said: list[str] = []

    async def connect(name, **_):
        return engines[name]

    def ready(name, client):
        if pools:
            pools[0].add(client, name)
        else:
            pools.append(Pool([client], names=[name]))

    def gone(name):
        return pools[0].remove(name)

    connector = Connector(
        Discovery([], path), ready, connect=connect, say=said.append, look_s=0.01,
        on_gone=gone,
    )  # fmt: skip
    await connector.start()
    await until(lambda: pools and len(pools[0].members) == 2)
    requests = [EngineRequest(f"r{i}", (i,), SamplingParams(max_tokens=30), eos_token_ids=(257,)) for i in range(4)]

    async def text(one):
        return [token async for output in pools[0].generate(one) for token in output.token_ids]

    running = [asyncio.ensure_future(text(one)) for one in requests]
    await until(lambda: len(engines["a:1"].live) == 2 and len(engines["b:1"].live) == 2)
    path.write_text("b:1\nc:1\n")
    await until(lambda: set(pools[0].members) == {"b:1", "c:1"})
    assert not engines["a:1"].closed
    assert [len(tokens) for tokens in await asyncio.gather(*running)] == [30] * 4
    await until(lambda: engines["a:1"].closed)
    assert any("no target any more" in line for line in said) and not engines["b:1"].closed
    await connector.close()
    assert engines["b:1"].closed and engines["c:1"].closed
