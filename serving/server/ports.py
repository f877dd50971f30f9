"""The server's ports, taken before anything slow: one that is taken is told at once."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.boot.flags.launch import HTTP_PORT
from serving.boot.lora_modules import lora_folder
from serving.engine.api.config import EngineConfig
from serving.frontends.sockets.listening import bind
from serving.transfer.config import TransferConfig
from sharding.address import own_address

if TYPE_CHECKING:
    from serving.access import Access, ServerTls
    from serving.frontends.grpc.server import GrpcServer


async def listen_grpc(args: argparse.Namespace, access: Access, tls: ServerTls | None) -> GrpcServer:
    """Listens, and can be asked for health from now on.

    Raises:
        OSError: the port is taken, or the host is not ours, in a sentence.
    """
    from serving.frontends.grpc.server import GrpcServer

    server = GrpcServer(args.host, args.grpc_port, access=access, tls=tls, lora_folder=lora_folder(args))
    await server.start()
    return server


def take_http(args: argparse.Namespace, say: Callable[[str], None]) -> socket.socket | None:
    """The socket of the HTTP front end, bound; None where there is to be none. Connections are refused until the front end
    listens on it. A taken port is an error only when it was asked for by name.

    Raises:
        OSError: it was, and is taken, or the host is not ours, in a sentence.
    """
    if args.no_http:
        return None
    port = HTTP_PORT if args.port is None else args.port
    try:
        return bind(args.host, port)
    except OSError as error:
        reason = f"cannot listen on {args.host}:{port} for HTTP ({error.strerror or error})"
        if args.port is not None:
            raise OSError(f"{reason}. Choose another port with --port.") from None
        say(f"{reason}; going on without. Choose another port with --port")
        return None


def kv_address(config: EngineConfig, host: str, port: int) -> tuple[str, int] | None:
    """Where other engines reach this one's gRPC; None where it exchanges no pages.

    Args:
        host: what it listens on.
    """
    told = TransferConfig.of(config.role, config.kv_transfer_config)
    if not told.role:
        return None
    if told.host:
        return told.host, port
    if host not in ("0.0.0.0", "::", ""):
        return host, port
    try:
        return own_address(), port
    except OSError:  # peers may know it by its name
        return socket.gethostname(), port
