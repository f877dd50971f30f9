"""What a caller asks of the routing beside its request: a session, a target that somebody in front has chosen, to be told why.

Headers (HTTP) and metadata (gRPC) have the same names. Those with `x-gateway-` are of the Gateway API Inference Extension
(proposal 004): a picker of endpoints in front sets them.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import caller_of_task
from serving.engine.api.types import EngineRequest
from serving.routing.router import Route, Wish

SESSION = "x-session-id"
EXPLAIN = "x-gateway-debug"
DECISION = "x-gateway-decision"
ENDPOINT = "x-gateway-destination-endpoint"
SUBSET = "x-gateway-destination-endpoint-subset"
FAIRNESS = "x-gateway-inference-fairness-id"
OBJECTIVE = "x-gateway-inference-objective"
SERVED = "x-gateway-destination-endpoint-served"
MAX_CHARS = 1024
"""Of a value that is taken."""
MAX_NOTES = 16
"""Decisions that are told of one request: it may be for many completions."""


@dataclasses.dataclass
class Asked:
    """One request's wishes, and what became of them.

    Attributes:
        explain: whether to tell the decisions.
        tenant: whom the request is for, where shares are fair; None: whoever sends it.
        objective: the name of what is aimed at, which the operator has given a priority.
    """

    wish: Wish
    explain: bool = False
    tenant: str | None = None
    objective: str | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    served: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, str], session_header: str = SESSION) -> Asked | None:
        """From a request's headers, by lower-case names; None where they ask for nothing."""
        session = values.get(session_header) or None
        endpoints = _names(values.get(ENDPOINT, ""))
        among = _names(values.get(SUBSET, ""))
        explain = values.get(EXPLAIN, "").lower() in ("1", "true", "yes")
        tenant, objective = values.get(FAIRNESS) or None, values.get(OBJECTIVE) or None
        if not (session or endpoints or among or explain or tenant or objective):
            return None
        wish = Wish(session and session[:MAX_CHARS], endpoints, frozenset(among))
        return cls(wish, explain, tenant and tenant[:MAX_CHARS], objective)

    def concerned(self, request: EngineRequest, objectives: Mapping[str, int]) -> EngineRequest:
        """The request with the tenant and the priority that were asked for. A key that speaks for itself alone is its own tenant.

        Args:
            objectives: priority of each objective; unknown ones change nothing.
        Raises:
            RequestError: PERMISSION_DENIED, for an objective ahead of everybody's.
        """
        caller = caller_of_task.get()
        if self.tenant is not None:
            tenant = caller.tenant(self.tenant) if caller is not None else self.tenant
            request = dataclasses.replace(request, tenant=tenant)
        if self.objective is not None and self.objective in objectives:
            priority = objectives[self.objective]
            if caller is not None:
                caller.check_priority(priority)
            request = dataclasses.replace(request, priority=priority)
        return request

    def note(self, route: Route, number: int, name: str, attempt: int) -> None:
        """A target is tried."""
        self.served = name
        if self.explain and len(self.notes) < MAX_NOTES:
            self.notes.append(f"{route.explain(number, attempt)}; attempt={attempt + 1}")

    def note_prefill(self, number: int) -> None:
        """An engine computes the prompt for the target that was noted last."""
        if self.explain and self.notes:
            self.notes[-1] += f"; prefill={number}"

    def told(self) -> list[tuple[str, str]]:
        """The headers of the reply."""
        found = [(DECISION, ", ".join(self.notes))] if self.notes else []
        if self.served is not None and self.served in self.wish.endpoints:  # others would learn an address of ours
            found.append((SERVED, self.served))
        return found


asked_of_task: contextvars.ContextVar[Asked | None] = contextvars.ContextVar("jaxserve_asked", default=None)
"""What the request that the running task serves asks of the routing."""


class AskedByHeaders:
    """Reads the wishes of HTTP requests, and puts the decisions into the headers of the replies."""

    def __init__(self, app: ASGIApp, session_header: str = SESSION) -> None:
        self.app = app
        self._session_header = session_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        values = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        asked = Asked.of(values, self._session_header)
        if asked is None:
            return await self.app(scope, receive, send)

        async def send_with_decision(message: Message) -> None:
            if message["type"] == "http.response.start":
                told = [(name.encode(), value.encode("latin-1", "replace")) for name, value in asked.told()]
                message["headers"] = [*message.get("headers", ()), *told]
            await send(message)

        token = asked_of_task.set(asked)
        try:
            await self.app(scope, receive, send_with_decision)
        finally:
            asked_of_task.reset(token)


class AskedByMetadata(grpc.aio.ServerInterceptor):
    """Reads the wishes of gRPC calls, and puts the decisions into the trailing metadata of those that succeed."""

    def __init__(self, session_header: str = SESSION) -> None:
        self._session_header = session_header

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Called in the task that then runs the call."""
        details: Any = handler_call_details
        values = {k: v for k, v in details.invocation_metadata or () if isinstance(v, str)}
        asked = Asked.of(values, self._session_header)
        handler: Any = await continuation(handler_call_details)
        if asked is None or handler is None:
            return handler
        asked_of_task.set(asked)
        inner = handler.unary_stream or handler.unary_unary
        if inner is None:
            return handler

        async def handle(request: Any, context: Any) -> Any:
            reply = await inner(request, context)
            context.set_trailing_metadata(tuple(asked.told()))
            return reply

        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        return make(handle, handler.request_deserializer, handler.response_serializer)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text[: 16 * MAX_CHARS].split(",") if name.strip())
