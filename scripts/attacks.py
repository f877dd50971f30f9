"""What a server's memory and its probes do while somebody tries to take it down: `python scripts/attacks.py --url URL --pid PID`.

Each attack runs for some seconds against a server without keys, while /health is asked all the time. The table tells the longest
wait for /health, how much resident memory grew at most, and how much is still there `--settle` seconds later. Exit status 1 when a
wait is over 2 s, growth over 300 MB (where images are unpacked 812), or what stays over 100 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gzip
import json
import pathlib
import struct
import sys
import time
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable

SECONDS = 8.0
MOST_WAIT_S, MOST_GROWN_MB, MOST_LEFT_MB = 2.0, 300.0, 100.0
UNPACKED_MB = 512.0
"""Of two images of 64 MP, which two threads may have unpacked."""
HEAD = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Target:
    """Where the server is."""

    def __init__(self, url: str, pid: int) -> None:
        parts = urllib.parse.urlsplit(url)
        self.host, self.port, self._pid = parts.hostname or "127.0.0.1", parts.port or 80, pid

    def resident_mb(self) -> float:
        """Resident memory of the server's process."""
        text = pathlib.Path(f"/proc/{self._pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, self.port)

    async def send(self, raw: bytes, read: bool = True) -> bytes:
        """One connection's bytes; what came back, as far as it came."""
        reader, writer = await self.connect()
        try:
            writer.write(raw)
            await writer.drain()
            return await reader.read(4096) if read else b""
        except ConnectionError:
            return b"closed"
        finally:
            writer.close()

    async def post(self, path: str, body: bytes, more: str = "") -> bytes:
        head = HEAD.format(path=path) + f"Content-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
        return await self.send(head.encode() + body)


Attack = Callable[[Target], Awaitable[str]]


def endless(head: str, piece: bytes) -> Attack:
    """Writes a head and then a piece again and again, until the server closes."""

    async def run(target: Target) -> str:
        reader, writer = await target.connect()
        sent, end = 0, time.monotonic() + SECONDS
        try:
            writer.write(head.encode())
            while time.monotonic() < end and not reader.at_eof():
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
            return f"{sent / 2**20:.1f} MB taken"
        except ConnectionError:
            return f"closed after {sent / 2**20:.1f} MB"
        finally:
            writer.close()

    return run


def bodies(path: str, body: bytes, times: int = 8, more: str = "") -> Attack:
    """The same body several times, four at once."""

    async def run(target: Target) -> str:
        found: dict[str, int] = {}
        gate = asyncio.Semaphore(4)

        async def one() -> None:
            async with gate:
                reply = await target.post(path, body, more)
            status = reply.split(b" ")[1].decode() if reply.startswith(b"HTTP") else "closed"
            found[status] = found.get(status, 0) + 1

        await asyncio.gather(*(one() for _ in range(times)))
        return ", ".join(f"{count} x {status}" for status, count in sorted(found.items()))

    return run


async def crowd(target: Target) -> str:
    """300 requests of 128 completions each at once."""
    body = json.dumps({"prompt": "a", "n": 128, "temperature": 1.0, "max_tokens": 500, "ignore_eos": True}).encode()
    found: dict[str, int] = {}

    async def one() -> None:
        try:
            async with asyncio.timeout(SECONDS):
                reply = await target.post("/v1/completions", body)
            status = reply.split(b" ")[1].decode()
        except TimeoutError:
            status = "runs"
        found[status] = found.get(status, 0) + 1

    await asyncio.gather(*(one() for _ in range(300)))
    return ", ".join(f"{count} x {status}" for status, count in sorted(found.items()))


def attached(parts: Callable[[], list[dict]], times: int = 8) -> Attack:
    """As `bodies`, chats with what `parts` makes."""

    async def run(target: Target) -> str:
        body = {"messages": [{"role": "user", "content": await asyncio.to_thread(parts)}], "max_tokens": 1}
        return await bodies("/v1/chat/completions", json.dumps(body).encode(), times)(target)

    return run


def black(side: int) -> str:
    """A square PNG, base64."""
    packer, row = zlib.compressobj(9), bytes(1 + 3 * side)
    packed = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + body).decode()


def pdf(size: int) -> str:
    """A PDF whose page unpacks to so many bytes of text, base64."""
    packer, piece = zlib.compressobj(9), b"BT /F 9 Tf 1 1 Td (a) Tj ET\n" * 10_000
    content = b"".join(packer.compress(piece) for _ in range(size // len(piece))) + packer.flush()
    objects = (
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 9 9] /Contents 4 0 R /Resources << /Font << /F 5 0 R >> >> >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    )
    body, places = b"%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, one)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    tail = b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(body)
    return base64.b64encode(body + table + tail).decode()


def many(text: str, count: int) -> bytes:
    return b"[" + ",".join([text] * count).encode() + b"]"


CHUNKED = "GET /health HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
CHAT = b'{"messages":[{"role":"user","content":"a"}],'
ATTACKS: dict[str, Attack] = {
    "trailers without end": endless(CHUNKED + "0\r\n", b"X-A: b\r\n" * 8192),
    "one trailer without end": endless(CHUNKED + "0\r\nX-A: ", b"b" * 65536),
    "a chunk extension without end": endless(CHUNKED + "1;x=", b"b" * 65536),
    "a head without end": endless("GET / HTTP/1.1\r\n", b"X-A: b\r\n" * 8192),
    "pipelined requests": endless("", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1024),
    "embeddings of 400,000 objects": bodies("/v1/embeddings", b'{"input":' + many("{}", 400_000) + b"}"),
    "16 MB of empty lists": bodies("/v1/embeddings", b'{"input":' + many("[]", 5_000_000) + b"}", 4),
    "prompts of a fraction": bodies("/v1/completions", b'{"prompt":' + many("[1.5]", 400_000) + b"}"),
    "a prompt of words, then objects": bodies("/v1/completions", b'{"prompt":["a",' + many("{}", 400_000)[1:] + b"}"),
    "documents": bodies("/rerank", b'{"query":"a","documents":' + many("{}", 400_000) + b"}"),
    "stop": bodies("/v1/completions", b'{"prompt":"a","stop":' + many("1", 1_000_000) + b"}"),
    "tools": bodies("/v1/chat/completions", CHAT + b'"tools":' + many("{}", 400_000) + b"}"),
    "messages": bodies("/v1/chat/completions", b'{"messages":' + many("{}", 400_000) + b"}"),
    "content parts": bodies(
        "/v1/chat/completions", b'{"messages":[{"role":"user","content":' + many('{"type":"text","text":"a"}', 300_000) + b"}]}"
    ),
    "input items": bodies("/v1/responses", b'{"input":' + many("{}", 400_000) + b"}"),
    "a million biases": bodies(
        "/v1/completions", b'{"prompt":"a","logit_bias":{' + b",".join(b'"%d":1' % i for i in range(1_000_000)) + b"}}"
    ),
    "brackets in brackets": bodies("/v1/completions", b'{"prompt":"a","user":' + b"[" * 8_000_000 + b"}"),
    "text of 262,000 characters": bodies("/tokenize", json.dumps({"prompt": "ab \u00e9\u4e16" * 52_000}).encode(), 16),
    "16 MB of quotes": bodies("/v1/completions", b'{"prompt":"' + b'\\"' * 8_000_000 + b'"}'),
    "inflated bodies": bodies(
        "/v1/completions", gzip.compress(b" " * 2**30, 9), 8, "Content-Encoding: gzip\r\n"
    ),
    "300 requests of n = 128": crowd,
    "images of 64 MP": attached(
        lambda: [{"type": "image_url", "image_url": {"url": "data:image/png;base64," + black(8192)}}] * 4
    ),
    "videos of 64 MP": attached(
        lambda: [{"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join([black(8192)] * 30)}}]
    ),
    "PDFs of 64 MB": attached(
        lambda: [{"type": "file", "file": {"file_data": "data:application/pdf;base64," + pdf(2**26)}}], 2
    ),
}  # fmt: skip


async def watch(target: Target, done: asyncio.Event) -> tuple[float, float]:
    """Longest wait for /health in seconds, and most resident memory in MB, until `done`."""
    worst = most = 0.0
    while not done.is_set():
        began = time.monotonic()
        try:
            async with asyncio.timeout(30):
                await target.send(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        except (TimeoutError, OSError):
            pass
        worst = max(worst, time.monotonic() - began)
        most = max(most, target.resident_mb())
        await asyncio.sleep(0.05)
    return worst, most


async def main(args: argparse.Namespace) -> int:
    """Runs the attacks. Returns the exit status."""
    target, failed = Target(args.url, args.pid), 0
    print(f"{'attack':34} {'/health, s':>10} {'grown, MB':>10} {'left, MB':>9}  outcome", flush=True)
    for name, attack in ATTACKS.items():
        if args.only and args.only not in name:
            continue
        before, done = target.resident_mb(), asyncio.Event()
        watcher = asyncio.create_task(watch(target, done))
        outcome = await attack(target)
        done.set()
        worst, most = await watcher
        await asyncio.sleep(args.settle)
        grown, left = max(most, target.resident_mb()) - before, target.resident_mb() - before
        allowed = MOST_GROWN_MB + (UNPACKED_MB if name.endswith("of 64 MP") else 0)
        bad = worst > MOST_WAIT_S or grown > allowed or left > MOST_LEFT_MB
        failed += bad
        print(f"{name:34} {worst:10.2f} {grown:10.0f} {left:9.0f}  {outcome}{'  TOO MUCH' if bad else ''}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pid", type=int, required=True, help="the server's process, for its memory")
    parser.add_argument("--settle", type=float, default=4.0, metavar="S", help="seconds before looking at what stays")
    parser.add_argument("--only", help="attacks whose name has this in it")
    sys.exit(asyncio.run(main(parser.parse_args())))
