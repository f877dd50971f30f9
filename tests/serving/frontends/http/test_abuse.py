"""Connections that send too much, too many or too slowly are ended; the others do not notice."""

from __future__ import annotations

import asyncio
import gzip
import zlib

from serving.service import Limits
from tests.mock_engine import MockEngine, until
from tests.serving.frontends.conftest import Running

POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


async def _talk(running: Running, *parts: bytes) -> bytes:
    """Sends the parts and reads to the connection's end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    try:
        async with asyncio.timeout(60):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.01)
            return await reader.read()
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


async def test_a_head_without_end_is_cut_off(running: Running):
    reply = await _talk(running, POST, *[b"X-Pad: " + b"x" * 8000 + b"\r\n"] * 20)
    assert reply == b"reset" or b"400 Bad Request" in reply
    reply = await _talk(running, POST + b"X-Pad: ", *[b"x" * 8000] * 20)
    assert reply == b"reset" or b"400 Bad Request" in reply
    assert (await running.chat()).status_code == 200


async def test_too_many_headers_are_refused(running: Running):
    reply = await _talk(running, POST, *[b"A: b\r\n" * 100] * 3, b"\r\n")
    assert b"400 Bad Request" in reply
    assert (await running.chat()).status_code == 200


async def test_a_head_that_does_not_come_is_given_up(start):
    running = await start(limits=Limits(head_timeout_s=0.3))
    assert await _talk(running) == b""
    assert await _talk(running, POST) == b""
    assert (await running.chat()).status_code == 200


async def test_a_body_that_stops_coming_is_given_up(start):
    running = await start(limits=Limits(body_gap_s=0.3))
    reply = await _talk(running, POST + b"Content-Length: 100\r\n\r\n", b'{"prompt": ')
    assert b" 408 " in reply and b'"error"' in reply
    assert not running.engine.requests


async def test_a_connection_is_used_again_after_waiting_longer_than_a_head_may_take(start):
    running = await start(limits=Limits(head_timeout_s=0.3))
    body = b'{"prompt": "a", "max_tokens": 2}'
    one = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
    async with asyncio.timeout(60):
        for _ in range(2):
            writer.write(one)
            assert b" 200 " in await reader.readuntil(b"\r\n\r\n")
            await reader.readuntil(b'"system_fingerprint":null}')
            await asyncio.sleep(0.5)
    writer.close()


async def test_a_client_that_reads_nothing_is_given_up_and_its_request_ended(start):
    engine = MockEngine(reply="word " * 400, max_model_len=10**6)
    running = await start(engine, limits=Limits(stalled_reader_s=0.4, max_prompt_chars=10**6))
    body = b'{"prompt": "a", "max_tokens": 500000, "ignore_eos": true, "stream": true}'
    _, writer = await asyncio.open_connection("127.0.0.1", running.server.port, limit=1024)
    writer.write(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    await until(lambda: engine.live, "the stream runs")
    await until(lambda: not engine.live, "it was given up")
    assert engine.aborted and engine.steps < 500_000
    writer.transport.abort()
    assert (await running.chat()).status_code == 200


async def test_a_client_that_reads_slowly_gets_everything(start):
    engine = MockEngine(reply="word " * 40, max_model_len=4096)
    running = await start(engine, limits=Limits(stalled_reader_s=5.0))
    body = b'{"prompt": "a", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port, limit=1024)
    writer.write(POST + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body)
    got = b""
    while piece := await reader.read(2048):
        got += piece
        await asyncio.sleep(0.02)
    writer.close()
    assert got.count(b'"text":') == 200 and b"[DONE]" in got


CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


async def test_no_part_of_a_message_is_without_bound(running: Running):
    for parts in (
        (CHUNKED + b"0\r\n", *[b"X-A: b\r\n" * 1000] * 40),  # trailers
        (CHUNKED + b"0\r\nX-A: ", *[b"b" * 8000] * 40),  # one of them
        (CHUNKED + b"1;x=", *[b"y" * 8000] * 40),  # a chunk's extension
        (b"GET /", *[b"x" * 8000] * 40),  # the path
        (b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 1000,),  # requests ahead of their replies
        (b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",),
    ):
        reply = await _talk(running, *parts)
        assert reply == b"reset" or b"400 Bad Request" in reply, (parts[0][-40:], reply[:80])
    assert not running.engine.requests
    assert (await running.chat()).status_code == 200


async def test_trailers_within_bounds_are_dropped(running: Running):
    body = b'{"prompt": "a", "max_tokens": 2}'
    raw = CHUNKED + b"%x;ext=1\r\n%b\r\n0\r\nX-A: b\r\nX-Request-Id: evil\r\n\r\n" % (len(body), body)
    reply = await _talk(running, raw.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\n"))
    assert b" 200 OK" in reply and b"evil" not in reply


async def test_no_compressed_body_is_without_bound(start):
    """By what it holds, by what comes of it, and by what follows behind its end, of which zlib would keep every byte."""
    running = await start(limits=Limits(max_body_bytes=100_000))
    head = POST.replace(b"Host: x\r\n", b"Host: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n")
    body = b'{"prompt": "a", "max_tokens": 2}'

    def chunk(data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data)

    stored = zlib.compressobj(level=0)
    nothing = stored.compress(b"") + stored.flush(zlib.Z_FULL_FLUSH)  # a head and a block that holds nothing
    for coding, parts, status in (
        (b"gzip", (gzip.compress(body),), 200),
        (b"deflate", (zlib.compress(body),), 200),
        (b"gzip", (gzip.compress(b" " * 200_000 + body),), 413),
        (b"gzip", (gzip.compress(body), *[bytes(8000)] * 40), 400),
        (b"gzip", (gzip.compress(body) + b"x",), 400),
        (b"gzip", (gzip.compress(body)[:-4],), 400),
        (b"deflate", (nothing, *[nothing[-5:] * 1600] * 40), 413),
        (b"gzip, gzip", (gzip.compress(gzip.compress(body)),), 415),
        (b"br", (body,), 415),
    ):
        sent = [head + b"Content-Encoding: " + coding + b"\r\n\r\n", *map(chunk, parts), b"0\r\n\r\n"]
        reply = await _talk(running, *sent)
        assert reply == b"reset" or b" %d " % status in reply.split(b"\r\n")[0], (coding, parts[0][:20], reply[:80])
    assert len(running.engine.requests) == 2


async def test_a_body_that_comes_too_slowly_is_given_up(start):
    running = await start(limits=Limits(body_timeout_s=0.5, body_gap_s=10.0))
    pieces = [b" "] * 200
    reply = await _talk(running, POST + b"Content-Length: 5000\r\n\r\n", *pieces)
    assert reply in (b"", b"reset") and not running.engine.requests


async def test_large_bodies_together_have_a_bound(start):
    running = await start(limits=Limits(max_bodies_bytes=200_000))
    held = [await asyncio.open_connection("127.0.0.1", running.server.port) for _ in range(2)]
    for _, writer in held:
        writer.write(POST + b"Content-Length: 150000\r\n\r\n" + b" " * 90_000)
        await writer.drain()
    await asyncio.sleep(0.2)
    reply = await _talk(running, POST + b"Content-Length: 100000\r\n\r\n" + b" " * 90_000)
    assert b" 503 " in reply and b"retry-after" in reply.lower()
    for _, writer in held:
        writer.close()
    await asyncio.sleep(0.1)
    assert (await running.chat()).status_code == 200


SHAPES = {
    "/v1/embeddings": [{"input": [{}] * 50_000}, {"input": [[]] * 50_000}, {"input": {"a": 1}}],
    "/v1/completions": [
        {"prompt": [[1.5]] * 50_000}, {"prompt": ["a", *[{}] * 50_000]}, {"prompt": "a", "stop": [1] * 50_000},
        {"prompt": "a", "logit_bias": {str(i): 1 for i in range(50_000)}}, {"prompt": "a", "bad_words": [1] * 50_000},
    ],
    "/v1/chat/completions": [
        {"messages": [{}] * 50_000}, {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}]},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{}] * 50_000},
    ],
    "/v1/responses": [{"input": [{}] * 50_000}],
    "/rerank": [{"query": "a", "documents": [{}] * 50_000}],
    "/v1/score": [{"text_1": "a", "text_2": [1] * 50_000}],
    "/detokenize": [{"tokens": [{}] * 50_000}],
}  # fmt: skip


async def test_lengths_are_checked_before_elements(running: Running):
    for path, bodies in SHAPES.items():
        for body in bodies:
            reply = await running.http.post(path, json=body)
            error = reply.json()["error"]
            assert reply.status_code == 400 and error["param"], (path, error)
            assert len(error["message"]) < 300, "one error, not one an element"


async def test_brackets_and_values_are_counted_before_anything_is_made_of_them(start):
    running = await start(limits=Limits(max_json_values=1000, max_json_depth=20))
    for body, word in (
        ('{"prompt": "a", "user": ' + "[" * 21 + "]" * 21 + "}", "nested more than 20"),
        ('{"prompt": "a", "metadata": [' + "{}," * 999 + "{}]}", "more than 1000 values"),
        ('{"prompt": ' + "[" * 300_000, "more than 1000 values"),
    ):
        reply = await running.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
        assert reply.status_code == 400 and word in reply.json()["error"]["message"]
    text = '[{,"\\[' * 20  # in a text they count for nothing
    reply = await running.http.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
    assert reply.status_code == 200


async def test_a_server_without_keys_answers_to_local_names_alone(start):
    running = await start(app={"allowed_hosts": ("api.example.com", "*.example.org", "2.Example.net.:8000")})
    for host, status in (
        ("localhost", 200), ("127.0.0.1:8000", 200), ("[::1]:8000", 200), ("jaxserve", 200), ("jaxserve.team.svc", 200),
        ("api.example.com:80", 200), ("a.b.example.org", 200), ("example.org", 403), ("evil.com", 403), ("evil.com.", 403),
        ("localhost.evil.com", 403), ("127.0.0.1.evil.com", 403), ("x@localhost.evil.com", 403), ("evil.com#.local", 403),
        ("evil.com?.local", 403), ("2.example.net", 200), ("x@localhost", 403), ("evil.com:80:90", 403), ("LOCALHOST.", 200),
    ):  # fmt: skip
        reply = await running.http.get("/v1/models", headers={"Host": host})
        assert reply.status_code == status, host
        assert status == 200 or reply.json()["error"]["code"] == "host_not_allowed"


async def test_more_completions_than_there_is_room_for_are_refused(start):
    engine = MockEngine(reply="word " * 10, step_s=0.005, max_model_len=100_000)
    running = await start(engine, limits=Limits(max_live_extra=40, max_live=12))
    body = {"prompt": "a", "n": 16, "temperature": 1.0, "max_tokens": 50_000, "ignore_eos": True, "stream": True}
    tasks = [asyncio.create_task(running.http.post("/v1/completions", json=body)) for _ in range(6)]
    await until(lambda: len(engine.live) == 32, "two of them run")
    refused = [task for task in tasks if task.done()]
    await until(lambda: sum(task.done() for task in tasks) == 4, "four were refused")
    refused = [task.result() for task in tasks if task.done()]
    assert {reply.status_code for reply in refused} == {429} and refused[0].json()["error"]["code"] == "queue_full"
    assert (await running.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code == 200
    for task in tasks:
        task.cancel()
    await until(lambda: not engine.live, "they are gone")


async def test_a_stop_that_cuts_replies_is_no_error_in_the_log(start, caplog):
    running = await start(MockEngine(reply="word " * 10, step_s=0.01, max_model_len=10**6))
    body = {"prompt": "a", "max_tokens": 50_000, "ignore_eos": True, "stream": True}
    task = asyncio.create_task(running.http.post("/v1/completions", json=body))
    await until(lambda: running.engine.live, "it runs")
    await running.server.stop(grace_s=0.0)
    await asyncio.gather(task, return_exceptions=True)
    assert not [record for record in caplog.records if "Cancel" in record.getMessage()]
