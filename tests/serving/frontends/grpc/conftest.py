import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from proto.jaxserve.v1 import control_pb2_grpc, inference_pb2_grpc
from serving.frontends.grpc.server import GrpcServer
from tests.mock_engine import MockEngine, mock_service


class Running:
    """A real server on a free port, over a mock engine, and stubs that call it."""

    def __init__(self, engine: MockEngine, server: GrpcServer, service, channel: grpc.aio.Channel) -> None:
        self.engine, self.server, self.service, self.channel = engine, server, service, channel
        self.target = f"127.0.0.1:{server.port}"
        self.inference = inference_pb2_grpc.InferenceStub(channel)
        self.control = control_pb2_grpc.ControlStub(channel)


@contextlib.asynccontextmanager
async def running(engine: MockEngine | None = None, **kwargs) -> AsyncIterator[Running]:
    engine = engine or MockEngine()
    service = mock_service(engine, **kwargs)
    server = GrpcServer("127.0.0.1", 0, service.limits)
    await server.start()
    await server.serve(service)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        try:
            yield Running(engine, server, service, channel)
        finally:
            await server.stop()


@pytest.fixture
def serve():
    """`async with serve(engine) as running: ...`"""
    return running
