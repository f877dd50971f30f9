"""Tells whoever started us that we are ready: systemd's protocol (sd_notify(3)), which our own supervisor speaks too."""

from __future__ import annotations

import contextlib
import os
import socket

VARIABLE = "NOTIFY_SOCKET"


def notify(state: str) -> None:
    """Sends a state such as "READY=1" or "STOPPING=1". Does nothing where nobody asked to be told."""
    address = os.environ.get(VARIABLE)
    if not address or not hasattr(socket, "AF_UNIX"):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.connect(address)
        out.send(state.encode())
