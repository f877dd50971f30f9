"""Taking a port."""

from __future__ import annotations

import socket


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: whoever connects is refused, and whoever else wants the port is told.

    Raises:
        OSError: another socket listens there, or the host is not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
    except BaseException:
        sock.close()
        raise
    return sock
