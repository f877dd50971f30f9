"""python -m serving.gateway: the OpenAI API as its own process, in front of one or more engines over gRPC."""

from serving.gateway.pool import Pool, Target

__all__ = ["Pool", "Target"]
