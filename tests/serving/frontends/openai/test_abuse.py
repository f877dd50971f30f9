"""Connections that send too much, too many or too slowly are ended; the others do not notice."""

from __future__ import annotations

import asyncio

from serving.service import Limits
from tests.mock_engine import MockEngine, until
from tests.serving.frontends.openai.conftest import Running

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
