"""python -m serving.gateway: the OpenAI API as its own process, in front of one or more engines over gRPC."""

from serving.gateway.pool import Pool, RemoteEngine

__all__ = ["Pool", "RemoteEngine"]
