"""What a client learns of a server beside its answers: whether it takes requests, as soon as that changes; its adapters."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto.jaxserve.v1 import control_pb2, inference_pb2
from serving.engine.api.adapters import AdapterClient, AdapterInfo, AdapterLoad
from serving.errors import ErrorKind, RequestError

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
AGAIN_S = 0.5


class HealthWatch:
    """Follows a server's health service (grpc.health.v1 Watch): draining and a closed connection are known at once.

    Attributes:
        serving: True until it says otherwise, and where it has no such service.
    """

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are made at run time
        self._task: asyncio.Task[None] | None = None
        self.serving = True

    def start(self) -> None:
        """Begins, in the running event loop."""
        self._task = asyncio.create_task(self._follow())

    async def close(self) -> None:
        """Stops following."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _follow(self) -> None:
        while True:
            try:
                async for reply in self._stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE)):
                    self.serving = reply.status == health_pb2.HealthCheckResponse.SERVING
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self.serving = True
                    return
            self.serving = False
            await asyncio.sleep(AGAIN_S)


class RemoteAdapters(AdapterClient):
    """The adapters that a server told of. They are loaded and unloaded there."""

    def __init__(self, loaded: Iterable[control_pb2.LoadedAdapter]) -> None:
        self._infos = [
            AdapterInfo(
                one.name, one.path, one.digest, one.rank, one.num_matrices, tuple(one.tenants) or None, one.own_text
            )
            for one in loaded
        ]

    def locate(self, path: str) -> Path:
        """Refuses, as `load`."""
        raise RequestError(ErrorKind.UNIMPLEMENTED, "Adapters are loaded at the engines, not through a gateway.")

    def load_now(self) -> AdapterLoad | None:
        """Not known here: routers read the engine's own metrics."""
        return None

    def load(self, name: str, path: str, replace: bool = False, **more: Any) -> AdapterInfo:
        """Refuses: it would have to be read on another machine."""
        raise ValueError("Adapters are loaded at the engines, not through a gateway.")

    def unload(self, name: str) -> AdapterInfo:
        """Refuses, as `load`."""
        raise RequestError(ErrorKind.UNIMPLEMENTED, "Adapters are unloaded at the engines, not through a gateway.")

    def find(self, name: str) -> AdapterInfo | None:
        return next((one for one in self._infos if one.name == name), None)

    def infos(self) -> list[AdapterInfo]:
        return list(self._infos)

    def name_of(self, digest: str) -> str:
        """What the server calls an adapter.

        Raises:
            RequestError: UNAVAILABLE, where it does not have it any more.
        """
        for one in self._infos:
            if one.digest == digest:
                return one.name
        raise RequestError(ErrorKind.UNAVAILABLE, "The engine does not have this adapter any more.", param="model")
