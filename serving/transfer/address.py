"""Where other machines reach this one."""

from __future__ import annotations

import contextlib
import ipaddress
import socket

_OUTSIDE = ("192.0.2.1", 9)  # of a network for documentation: nothing is sent there


def own_address() -> str:
    """This machine's address for others: what its name stands for; where that leads back to itself alone (Debian and containers
    have it stand for 127.0.1.1), the address from which it would reach others.

    Raises:
        OSError: it has none, or none is known.
    """
    found = "127.0.0.1"
    with contextlib.suppress(OSError):  # a name that its own machine does not know
        found = socket.gethostbyname(socket.gethostname())
    if not ipaddress.ip_address(found).is_loopback:
        return found
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(_OUTSIDE)
        return probe.getsockname()[0]
