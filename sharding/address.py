"""Where other machines reach this one."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

_OUTSIDE = "192.0.2.1"  # of a network for documentation: nothing is sent there


def own_address() -> str:
    """This machine's address for others: what its name stands for; where that leads back to itself alone (Debian and containers
    have it stand for 127.0.1.1), the address from which it would reach others.

    Raises:
        OSError: it has none, or none is known.
    """
    found = "127.0.0.1"
    with contextlib.suppress(OSError):  # a name that its own machine does not know
        found = socket.gethostbyname(socket.gethostname())
    return _from_here(_OUTSIDE) if _is_loopback(found) else found


def address_towards(host: str) -> str:
    """This machine's address for whoever is at `host`, or next to it: the one from which it would reach it. A loopback address only
    where `host` is one, and not a name that stands for one here alone.

    Raises:
        OSError: nothing leads there, or nobody knows the name.
    """
    found = _from_here(host)
    named = host != "localhost" and not _is_loopback(host)
    return own_address() if named and _is_loopback(found) else found


def _from_here(host: str) -> str:
    kind, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(kind, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
