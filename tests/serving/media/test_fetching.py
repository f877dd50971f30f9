"""What is fetched and what is not: nothing unless the operator says so, and never anything inside."""

import contextlib
import http.server
import os
import socket
import threading
import time

import pytest

from serving.errors import RequestError
from serving.media import fetching
from serving.media.decoding import decode
from serving.media.fetching import MediaPolicy, fetch, is_public
from tests.serving.media.images import encoded

INSIDE = [
    "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "224.0.0.1",
    "255.255.255.255", "192.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1",
    "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", INSIDE)
def test_addresses_inside(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34"])
def test_addresses_outside(address):
    assert is_public(address)


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name was resolved"))
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a connection was made"))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a", "HTTPS://example.com/a", "http://a.example.com@evil.com/", "http://example.com.evil.com/",
        "http://user:key@ok.com/", "http://ok.com/\r\nHost: evil.com", "http://ok.com/ x", "http://[::1]/", "http://2130706433/",
        "http://0x7f.1/", "http:///a", "http://ok.com:99999/", "gopher://ok.com/", "//ok.com/a", "javascript:1", "x" * 4096,
    ],
)  # fmt: skip
def test_urls_that_nobody_allowed(url, no_network):
    policy = MediaPolicy(domains=("ok.com",))
    for one in (MediaPolicy(), policy):
        with pytest.raises(RequestError):
            fetch(url, one, "here")


@pytest.mark.parametrize("inside", ["127.0.0.1", "169.254.169.254", "10.1.2.3", "::1"])
def test_a_name_that_means_something_inside_is_not_connected_to(inside, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("a connection was made"))
    public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", 80))
    private = (socket.AF_INET, socket.SOCK_STREAM, 6, "", (inside, 80))
    for found in ([private], [public, private]):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *a, found=found, **k: found)
        with pytest.raises(RequestError, match="cannot be fetched"):
            fetch("http://ok.com/a", MediaPolicy(domains=("*",)), "here")


class Handler(http.server.BaseHTTPRequestHandler):
    image = encoded()

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers["Host"]))  # type: ignore[attr-defined]
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/ok")
            self.end_headers()
            return
        if self.path in ("/slow%20head", "/slow%20body"):
            self.drip(self.path == "/slow%20head")
            return
        self.send_response(200 if self.path != "/missing" else 404)
        self.end_headers()
        body = self.image if self.path != "/endless" else b"x" * 200_000
        self.wfile.write(body)

    def drip(self, head: bool) -> None:
        """An image, behind ten seconds of a byte now and then."""
        if not head:
            self.send_response(200)
            self.end_headers()
        self.wfile.write(b"HTTP/1.0 200 OK\r\nA: " if head else b"")
        with contextlib.suppress(OSError):  # whoever asked may be gone
            for _ in range(200):
                self.wfile.write(b"a")
                time.sleep(0.05)
            self.wfile.write(b"\r\n\r\n" * head + self.image)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def web(monkeypatch):
    """A server of this machine that passes for a public one. Names are looked up once: a second look-up would lead inside."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    looked: list[str] = []

    def look(host, port, **kwargs):
        looked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.216.34", port))]

    def connect(address, timeout=None):
        assert address[0] == "93.184.216.34", "to the address that was looked at"
        made = socket.socket()
        made.settimeout(timeout)
        made.connect(("127.0.0.1", server.server_address[1]))
        return made

    monkeypatch.setattr(socket, "getaddrinfo", look)
    monkeypatch.setattr(socket, "create_connection", connect)
    yield server, looked
    server.shutdown()
    server.server_close()


def test_what_is_allowed_is_fetched_from_the_address_that_was_looked_at(web):
    server, looked = web
    policy = MediaPolicy(domains=("ok.com",), max_bytes=100_000)
    assert fetch("http://OK.com./ok?a=b", policy, "here") == Handler.image
    assert looked == ["ok.com"] and server.seen == [("/ok?a=b", "ok.com")]


@pytest.mark.parametrize(
    ("path", "words"),
    [("/moved", "cannot be fetched"), ("/missing", "cannot be fetched"), ("/endless", "too large")],
)
def test_nobody_is_redirected_and_nothing_is_read_without_end(web, path, words):
    server, _ = web
    with pytest.raises(RequestError, match=words):
        fetch(f"http://ok.com{path}", MediaPolicy(domains=("ok.com",), max_bytes=100_000), "here")
    assert len(server.seen) == 1


@pytest.mark.parametrize("path", ["/slow%20head", "/slow%20body"])
def test_who_says_a_byte_now_and_then_is_not_listened_to_for_ever(path, web):
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetch(f"http://ok.com{path}", MediaPolicy(domains=("ok.com",), fetch_s=0.3), "here")


def test_files_below_the_folder_alone(tmp_path):
    folder, outside = tmp_path / "media", tmp_path / "secret"
    folder.mkdir()
    outside.write_bytes(b"secret")
    (folder / "a b.png").write_bytes(b"image")
    (folder / "link").symlink_to(outside)
    os.mkfifo(folder / "pipe")
    policy = MediaPolicy(folder=folder, max_bytes=10)
    assert fetch(f"file://{folder}/a%20b.png", policy, "here") == b"image"
    (folder / "large").write_bytes(b"x" * 11)
    for name in ("link", "pipe", "../secret", "..%2fsecret", "none", "", "large", "a%00b"):
        with pytest.raises(RequestError):
            fetch(f"file://{folder}/{name}", policy, "here")
    for url in (f"file://{outside}", f"file://elsewhere{folder}/a%20b.png", "file:///dev/zero", f"file://{folder}"):
        with pytest.raises(RequestError):
            fetch(url, policy, "here")
    with pytest.raises(RequestError, match="reads no files"):
        fetch(f"file://{folder}/a%20b.png", MediaPolicy(), "here")


def test_data_is_bounded_before_it_is_unpacked(monkeypatch):
    monkeypatch.setattr(fetching.base64, "b64decode", lambda *a, **k: pytest.fail("unpacked"))
    with pytest.raises(RequestError, match="too large"):
        fetch("data:image/png;base64," + "A" * 200, MediaPolicy(max_bytes=100), "here")


def _header(width: int, height: int) -> bytes:
    """A PNG that says that it is so large, and has nothing in it."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(65535, 65535), (2**31 - 1, 2**31 - 1), (100_000, 1000), (1, 100_000), (201, 1)])
def test_sizes_are_looked_at_before_pixels(size, monkeypatch):
    from PIL import PngImagePlugin

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("unpacked"))
    with pytest.raises(RequestError, match="here: the image"):
        decode(_header(*size), MediaPolicy(max_pixels=2**24), "here")


def test_damaged_files_are_refused_in_the_same_words():
    words = set()
    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = encoded(kind=kind)
        assert decode(whole, MediaPolicy(), "here").size == (40, 30)
        for cut in (0, 1, 8, 20, len(whole) // 3):
            with pytest.raises(RequestError) as refused:
                decode(whole[:cut], MediaPolicy(), "here")
            words.add(refused.value.message)
    with pytest.raises(RequestError) as refused:  # says that it has more than it has
        decode(_header(100, 100), MediaPolicy(), "here")
    assert words | {refused.value.message} == {"here: the image cannot be read. PNG, JPEG, WebP and GIF are."}


def test_an_image_lies_as_its_camera_was_held():
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(encoded(40, 30, "JPEG", exif=exif), MediaPolicy(), "here")
    assert turned.size == (30, 40) and turned.mode == "RGB"
