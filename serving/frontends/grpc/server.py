"""The gRPC server: Inference, Control, health and reflection on one port."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.access import Access, ServerTls
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.access import RequireKey
from serving.frontends.grpc.handlers import CONTROL, INFERENCE, Control, Inference, generic_handler
from serving.frontends.grpc.transfer import TRANSFER, Transfer
from serving.service import Limits, Served

SERVICES = (INFERENCE.full_name, CONTROL.full_name, TRANSFER.full_name)
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def server_options(limits: Limits) -> list[tuple[str, int]]:
    """Channel arguments of the server."""
    return [
        ("grpc.max_receive_message_length", limits.max_body_bytes),
        # Beyond the first calls fail now and then, the more the closer to the second: here at one bound.
        ("grpc.max_metadata_size", limits.max_head_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_head_bytes),
        ("grpc.max_send_message_length", -1),
        # Identity alone. gRPC looks at a message's size before it inflates it, and asks for no key before: 16 MB of zeros, which
        # travel as 16 kB, could be 16 GB here. A compressed message is UNIMPLEMENTED.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.max_concurrent_streams", limits.max_live),
        # By default a second server on the port would silently take half of the connections.
        ("grpc.so_reuseport", 0),
        # Ask a silent peer after a minute, and take it for gone (its requests are aborted) 20 s later.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping every 10 s while a long prompt is computed.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


class GrpcServer:
    """Listens from `start` on; answers UNAVAILABLE until `serve` gives it a service.

    Health: "" says that the process lives; the services' names say whether they take requests.

    Args:
        host, port: where to listen; port 0 takes a free one.
        limits: bounds the size of a message.
        access: the keys that calls must bring; None asks for none.
        tls: listen with TLS; None does without.
        interceptors: further ones, behind that which asks for keys.
        lora_folder: below which adapters lie that admins may load; None: they may load none.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 50051,
        limits: Limits | None = None,
        *,
        access: Access | None = None,
        tls: ServerTls | None = None,
        interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
        lora_folder: Path | None = None,
    ) -> None:
        self._interceptors = tuple(interceptors)
        self._host = host
        self._asked_port = port
        self._limits = limits or Limits()
        self._access = access or Access()
        self._telling: set[asyncio.Task[None]] = set()
        self._tls = tls
        self._lora_folder = lora_folder
        self._service: Served | None = None
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - set at run time
        self.port = 0

    async def start(self) -> int:
        """Binds and listens. Returns the port.

        Raises:
            OSError: the address cannot be bound, in a sentence.
        """
        interceptors = (RequireKey(self._access), *self._interceptors)
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options(self._limits))
        control = Control(self._require, self._access, self._lora_folder)
        for servicer in (Inference(self._require), control, Transfer(lambda: self._require().first, self._access)):
            self._server.add_generic_rpc_handlers((generic_handler(servicer, self._limits),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self._set_ready(False)
        host = f"[{self._host}]" if ":" in self._host else self._host
        address = f"{host}:{self._asked_port}"
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                credentials = grpc.ssl_server_credentials(**self._tls.grpc_arguments())
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise OSError(
                f"cannot listen on {address}: the port is taken, or the address is not this machine's. "
                "Choose another with --grpc-port or --host."
            )
        await self._server.start()
        return self.port

    async def serve(self, service: Served) -> None:
        """From now on requests are answered."""
        self._service = service
        service.draining_listeners.append(self._on_draining)
        await self._set_ready(not service.draining)

    def _on_draining(self, draining: bool) -> None:
        task = asyncio.get_running_loop().create_task(self._set_ready(not draining))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def drain(self) -> None:
        """Tells load balancers to send no more. The service itself refuses new requests and ends the old ones."""
        await self._set_ready(False)

    async def stop(self, grace_s: float = 0.0) -> None:
        """Stops listening; calls still open after `grace_s` seconds are cancelled, which aborts their requests."""
        await self._set_ready(False)
        await self._server.stop(grace_s)

    async def _set_ready(self, ready: bool) -> None:
        for name in SERVICES:
            await self._health.set(name, _SERVING if ready else _NOT_SERVING)

    def _require(self) -> Served:
        if self._service is None:
            raise RequestError(ErrorKind.UNAVAILABLE, "The model is still being loaded.", retry_after_s=2.0)
        return self._service
