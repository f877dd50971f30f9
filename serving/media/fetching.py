"""Where a request's media may come from: inside the request (`data:`) always, the web and files only as the operator says.

What a client names is looked up by this server, which may reach what the client may not (SSRF): so names are resolved once, the
addresses must be public ones, the connection goes to the address that was checked, and nobody is redirected. Errors are constant
sentences: they tell nothing of what a server inside answered.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
import urllib.parse
from pathlib import Path

from serving.errors import RequestError, invalid

CHUNK = 64 * 1024


@dataclasses.dataclass(frozen=True)
class MediaPolicy:
    """What is taken, and from where.

    Attributes:
        domains: hosts from which http and https URLs are fetched: names, exactly; "*" for any. () fetches nothing.
        folder: below which files may be read; None for none.
        max_images, max_videos, max_sounds, max_files: of one request.
        max_bytes: of one file or data URI, decoded.
        max_pixels, max_request_pixels: of one image as it is stored, and of all that are unpacked for a request, frames that a
            video is sent as included: a picture of one colour is small as a file and a second's work.
        max_aspect: how many times longer than wide, or the other way round.
        max_frames: of one video that are read.
        max_stored_frames, max_seconds: of one video file.
        video_s: seconds for decoding one.
        max_sound_s: of one sound.
        sound_s: seconds for reading one.
        fetch_s: seconds for one download, from the look-up of its name on.
        read_s: seconds for all of a request's media, downloads included.
    """

    domains: tuple[str, ...] = ()
    folder: Path | None = None
    max_images: int = 64
    max_videos: int = 8
    max_sounds: int = 64
    max_files: int = 8
    max_bytes: int = 64 * 2**20
    max_pixels: int = 2**26
    max_request_pixels: int = 2**28
    max_aspect: int = 200
    max_frames: int = 768
    max_stored_frames: int = 108_000
    max_seconds: float = 3600.0
    video_s: float = 45.0
    max_sound_s: float = 3600.0
    sound_s: float = 30.0
    fetch_s: float = 10.0
    read_s: float = 60.0


def fetch(url: str, policy: MediaPolicy, place: str) -> bytes:
    """The bytes that a URL names. Blocks.

    Args:
        place: of the part in the request, for errors.
    Raises:
        RequestError: INVALID_ARGUMENT: not allowed, not there, too large, or too slow.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        return _from_data(url, policy, place)
    if scheme == "file":
        return _from_file(url, policy, place)
    if scheme in ("http", "https"):
        return _from_web(url, policy, place)
    raise invalid(f"{place}: give a data: URI, such as data:image/png;base64,...", place)


def _from_data(url: str, policy: MediaPolicy, place: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise invalid(f"{place} is no data: URI: it has no comma.", place)
    if not head.lower().endswith(";base64"):
        raise invalid(f"{place}: a data: URI must be in base64, as in data:image/png;base64,...", place)
    if len(body) > policy.max_bytes // 3 * 4 + 4:
        raise _too_large(policy, place)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise invalid(f"{place} is not valid base64.", place) from None


def _from_file(url: str, policy: MediaPolicy, place: str) -> bytes:
    if policy.folder is None:
        raise invalid(f"{place}: this server reads no files. Send the content as a data: URI.", place)
    refused = invalid(f"{place}: the file cannot be read.", place)
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise refused
    try:
        root = policy.folder.resolve(strict=True)
        path = Path(urllib.parse.unquote(parts.path)).resolve(strict=True)  # links are followed first, then looked at
        if not path.is_relative_to(root):
            raise refused
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise refused
            found = file.read(policy.max_bytes + 1)
    except (OSError, ValueError):
        raise refused from None
    if len(found) > policy.max_bytes:
        raise _too_large(policy, place)
    return found


def _from_web(url: str, policy: MediaPolicy, place: str) -> bytes:
    if not policy.domains:
        raise invalid(f"{place}: this server fetches nothing. Send the content as a data: URI.", place)
    refused = invalid(f"{place}: the URL cannot be fetched from this server.", place)
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
        named = host.encode("idna").decode("ascii").lower() if host else ""
    except (ValueError, UnicodeError):
        raise refused from None
    if not named or parts.username is not None or any(ord(c) <= 32 or ord(c) > 126 for c in url):
        raise refused
    if "*" not in policy.domains and named not in policy.domains:
        raise invalid(f"{place}: this server does not fetch from that host.", place)
    deadline = time.monotonic() + policy.fetch_s
    try:
        return _download(parts, named, port, policy, deadline, refused, place)
    except RequestError:
        raise
    except (OSError, http.client.HTTPException, ValueError):
        raise refused from None


def _download(
    parts: urllib.parse.SplitResult,
    host: str,
    port: int | None,
    policy: MediaPolicy,
    deadline: float,
    refused: RequestError,
    place: str,
) -> bytes:
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    address = public_address(host, port)
    if address is None:
        raise refused
    with contextlib.ExitStack() as opened:
        stream = opened.enter_context(socket.create_connection((address, port), max(0.1, deadline - time.monotonic())))
        if secure:  # the certificate is checked for the name, the connection goes to the address that was looked at
            context = ssl.create_default_context()
            stream = opened.enter_context(
                context.wrap_socket(stream, server_hostname=host, do_handshake_on_connect=False)
            )
        # A socket's own timeout is for each of its bytes, of which a head, too, may have many.
        watch = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, (stream,))
        watch.daemon = True
        watch.start()
        opened.callback(watch.cancel)
        if isinstance(stream, ssl.SSLSocket):
            stream.do_handshake()
        connection = http.client.HTTPConnection(host, port)
        connection.sock = stream
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request(
            "GET",
            path,
            headers={"Accept": "image/*, video/*, audio/*", "Connection": "close", "User-Agent": "jaxserve"},
        )
        answer = opened.enter_context(connection.getresponse())
        if answer.status != 200:  # nobody is redirected
            raise refused
        found = bytearray()
        while piece := answer.read1(CHUNK):
            found += piece
            if len(found) > policy.max_bytes:
                raise _too_large(policy, place)
        if time.monotonic() > deadline:  # then its end is that of our patience
            raise refused
        return bytes(found)


def _hang_up(stream: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(stream, socket.SHUT_RDWR)  # TLS' own would unmake what another thread reads from


def public_address(host: str, port: int) -> str | None:
    """An address of a host that is out in the public, where all of its addresses are; else None."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    addresses = [str(entry[4][0]) for entry in found]
    return addresses[0] if addresses and all(map(is_public, addresses)) else None


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody may reach: no loopback, private, link-local, shared, reserved or multicast one,
    however it is written inside IPv6."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.IPv6Network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _too_large(policy: MediaPolicy, place: str) -> RequestError:
    return invalid(f"{place} is too large: at most {policy.max_bytes} bytes are taken.", place)
