"""Asks every call for its key, but for health checks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from serving.access import Access, caller_of_task
from serving.errors import RequestError
from serving.frontends.grpc.context import begin_call, end_call
from serving.frontends.grpc.errors import status_of

PROBES = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})


class RequireKey(grpc.aio.ServerInterceptor):
    """Ends calls without a key with UNAUTHENTICATED; tells the others' tasks on whose behalf they work."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Called in the task that then runs the call, so what it sets in the task's context stays for the call."""
        details: Any = handler_call_details
        if details.method not in PROBES:
            given = [value for key, value in details.invocation_metadata or () if key == "authorization"]
            try:
                caller_of_task.set(self._access.check(given[0] if len(given) == 1 else None))
            except RequestError as error:
                return _refusal(error, details.method)
        return await continuation(handler_call_details)


def _refusal(error: RequestError, method: str) -> grpc.RpcMethodHandler:
    """A handler for calls of any shape that ends them with the error's status."""
    status, message, trailing = status_of(error)

    async def refuse(requests: Any, context: Any) -> None:
        began = begin_call(context)
        try:
            await context.abort(status, message, trailing)
        finally:
            end_call(context, method.rpartition("/")[2], began)

    return grpc.stream_stream_rpc_method_handler(refuse)  # type: ignore[arg-type]
