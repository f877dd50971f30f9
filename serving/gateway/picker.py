"""An endpoint picker for Envoy and Kubernetes' gateways: the router behind the protocol of the Gateway API Inference Extension
(proposal 004), which is Envoy's external processing.

The proxy asks here, for every request, which model server gets it, and sends it there itself. The answer is the header
`x-gateway-destination-endpoint`, and the same in dynamic metadata under `envoy.lb`: the chosen address, then those to try when it
fails. 503 where no server is ready, 429 where a key has asked too often.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from google.protobuf import struct_pb2

from proto.jaxserve.v1 import ext_proc_pb2 as pb
from serving.access import ServerTls
from serving.engine.api.media import Media, MediaOrigin
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.errors import RequestError, invalid
from serving.frontends.http.errors import failure_of
from serving.frontends.openai.errors import body as error_body
from serving.gateway.asking import DECISION, ENDPOINT, SERVED, SUBSET, Asked
from serving.gateway.pool import Pool
from serving.media.parts import senses_of
from serving.routing.router import Route, Visit, Wish
from serving.service import GenerateInput, TextService

LB = "envoy.lb"
SUBSET_HINT = "envoy.lb.subset_hint"
PIECE_BYTES = 62_000
"""Envoy takes no larger piece of a body."""
MAX_FALLBACKS = 3
PREFILLER = "x-prefiller-host-port"
"""llm-d's: which server computes the prompt, for the sidecar in front of the one that goes on with it."""
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
_DUPLEX, _OVERWRITE = 4, 2  # Envoy's FULL_DUPLEX_STREAMED and OVERWRITE_IF_EXISTS_OR_ADD


class EndpointPicker:
    """Answers one proxy, or several.

    Args:
        service: renders and tokenizes prompts, as the model servers will.
        pool: the model servers, over gRPC: their loads and health.
        http_port: where they speak HTTP: what the proxy is sent to is each target's host with this port.
    """

    def __init__(self, service: TextService, pool: Pool, http_port: int) -> None:
        self._service = service
        self._pool = pool
        self._http_port = http_port

    async def process(
        self, request_iterator: AsyncIterator[pb.ProcessingRequest], context: Any
    ) -> AsyncIterator[pb.ProcessingResponse]:
        """One request of the proxy's, from its headers to the end of its answer."""
        exchange = Exchange(self._service, self._pool, self._http_port)
        try:
            async for message in request_iterator:
                for reply in await exchange.answer(message):
                    yield reply
        finally:
            exchange.close()


class Exchange:
    """What is known of one request."""

    def __init__(self, service: TextService, pool: Pool, http_port: int) -> None:
        self._service, self._pool, self._http_port = service, pool, http_port
        self._headers: dict[str, str] = {}
        self._body = bytearray()
        self._duplex = True
        self._picked = False
        self._asked: Asked | None = None
        self._route: Route | None = None
        self._visit: Visit | None = None

    async def answer(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        """The replies to one message, in order."""
        if message.HasField("protocol_config"):
            self._duplex = message.protocol_config.request_body_mode == _DUPLEX
        which = message.WhichOneof("request")
        try:
            if which == "request_headers":
                return await self._on_headers(message)
            if which == "request_body":
                return await self._on_body(message.request_body)
        except RequestError as error:
            return [_refusal(error)]
        if which == "response_headers":
            return [self._on_response(message)]
        if which == "response_body":
            if message.response_body.end_of_stream:
                self.close()
            response = _body_pieces(message.response_body.body, message.response_body.end_of_stream, self._duplex)
            return [pb.ProcessingResponse(response_body=one) for one in response]
        if which == "request_trailers":
            return [pb.ProcessingResponse(request_trailers=pb.TrailersResponse())]
        return [pb.ProcessingResponse(response_trailers=pb.TrailersResponse())] if which == "response_trailers" else []

    def close(self) -> None:
        """The answer is complete, or the proxy has given up."""
        if self._visit is not None:
            self._pool.router.end(self._visit, ())
            self._visit = None

    async def _on_headers(self, message: pb.ProcessingRequest) -> list[pb.ProcessingResponse]:
        headers = message.request_headers
        for one in headers.headers.headers:
            self._headers[one.key.lower()] = (one.raw_value or one.value.encode()).decode("latin-1")
        self._asked = Asked.of(self._headers) or Asked(Wish())
        hint = message.metadata_context.filter_metadata.get(SUBSET_HINT)
        if hint is not None and SUBSET in hint.fields:
            self._asked.wish = Wish(self._asked.wish.session, (), frozenset(_texts(hint.fields[SUBSET])))
        if headers.end_of_stream:
            return [self._reply_headers(await self._pick())]
        # Envoy sends a buffered body only once the headers are answered, one that streams at once.
        return [] if self._duplex else [pb.ProcessingResponse(request_headers=pb.HeadersResponse())]

    async def _on_body(self, body: pb.HttpBody) -> list[pb.ProcessingResponse]:
        self._body += body.body
        if len(self._body) > self._service.limits.max_body_bytes:
            raise invalid(f"The body has more than {self._service.limits.max_body_bytes} bytes. Send less.")
        if not body.end_of_stream:
            return []
        common = await self._pick()
        if self._duplex:
            pieces = _body_pieces(bytes(self._body), True, True)
            return [self._reply_headers(common), *(pb.ProcessingResponse(request_body=one) for one in pieces)]
        return [pb.ProcessingResponse(request_body=pb.BodyResponse(response=common[0]), dynamic_metadata=common[1])]

    def _on_response(self, message: pb.ProcessingRequest) -> pb.ProcessingResponse:
        told = message.metadata_context.filter_metadata.get(LB)
        served = told.fields[SERVED].string_value if told is not None and SERVED in told.fields else None
        if served is not None and self._visit is not None:
            self._move(served)
        if message.response_headers.end_of_stream:
            self.close()
        headers = self._asked.told() if self._asked is not None else []
        common = pb.CommonResponse(header_mutation=_mutation([(k, v) for k, v in headers if k == DECISION]))
        return pb.ProcessingResponse(response_headers=pb.HeadersResponse(response=common))

    def _move(self, served: str) -> None:
        """The proxy went to another server than the first: that is where the request, and its prefix, now are."""
        assert self._visit is not None and self._route is not None
        target = next((one for one in self._route.order if self._endpoint(one.name) == served), None)
        if target is not None and target is not self._visit.target:
            self._pool.router.end(self._visit, None)
            self._pool.router.retries["proxy"] += 1
            self._visit = self._pool.router.begin(self._route, target)

    async def _pick(self) -> tuple[pb.CommonResponse, struct_pb2.Struct]:
        """Decides: what is to be done with the headers, and the metadata."""
        assert self._asked is not None and not self._picked
        self._picked = True
        request = self._asked.concerned(await self._request(), self._pool.objectives)
        among = self._asked.wish.among
        wish = self._asked.wish
        if among:
            names = {self._endpoint(one): one for one in self._pool.members}
            names |= {one.rpartition(":")[0]: one for one in self._pool.members}
            wish = Wish(wish.session, (), frozenset(names[one] for one in among if one in names) or frozenset({""}))
        self._route = self._pool.route(request, wish)
        chosen = self._route.order[0]
        running = chosen.load
        self._visit = self._pool.router.begin(self._route, chosen)
        self._asked.note(self._route, self._pool.members[chosen.name].number, chosen.name, 0)
        headers = self._prefiller(request, chosen.name, running)
        value = ",".join(self._endpoint(one.name) for one in self._route.order[: 1 + MAX_FALLBACKS])
        metadata = struct_pb2.Struct()
        metadata.update({LB: {ENDPOINT: value}})
        return pb.CommonResponse(
            header_mutation=_mutation([(ENDPOINT, value), *headers]), clear_route_cache=True
        ), metadata

    def _prefiller(self, request: EngineRequest, name: str, running: int) -> list[tuple[str, str]]:
        """Who computes the prompt, for a sidecar of the chosen server that makes the two calls; empty: that server itself. Said
        either way where there are such engines, so that nobody else's word for it gets through."""
        prefills, route = self._pool.prefills, self._route
        if not prefills.helpers or route is None:
            return []
        info = self._pool.members[name].client.info()
        helper = prefills.decide(request, info, route.matched_tokens, running)
        return [(PREFILLER, "" if helper is None else self._endpoint(helper.name))]

    async def _request(self) -> EngineRequest:
        """As much of the request as routing needs. What cannot be read is the model server's to refuse."""
        ids: list[int] = []
        body: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(bytes(self._body)) if self._body else None
        given = _input_of(body) if isinstance(body, dict) else None
        adapter = salt = None
        if given is not None:
            try:
                info = self._service.adapters.find(given.model or "", given.tenant)
                adapter = info and info.digest
                _, ids = await self._service.tokenize(given)
            except RequestError as error:
                if error.kind.http_status == 429:
                    raise
            except (TypeError, ValueError):
                ids = []
            salt = body.get("cache_salt") if isinstance(body.get("cache_salt"), str) else None
        senses = senses_of(given.messages) if given is not None and not isinstance(given.messages, str) else ()
        media = Media((), 0, origin=MediaOrigin((), tuple((b"", one) for one in senses), {})) if senses else None
        return EngineRequest("", tuple(ids), SamplingParams(), adapter=adapter, cache_salt=salt, media=media)

    def _reply_headers(self, found: tuple[pb.CommonResponse, struct_pb2.Struct]) -> pb.ProcessingResponse:
        return pb.ProcessingResponse(request_headers=pb.HeadersResponse(response=found[0]), dynamic_metadata=found[1])

    def _endpoint(self, name: str) -> str:
        return f"{name.rpartition(':')[0]}:{self._http_port}"


async def serve_picker(
    picker: EndpointPicker, host: str, port: int, tls: ServerTls | None
) -> tuple[grpc.aio.Server, int]:
    """Starts the picker's own server: it, and where it listens.

    Raises:
        OSError: the port is taken, or the host is not ours.
    """
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    handler = grpc.stream_stream_rpc_method_handler(
        picker.process,  # pyright: ignore[reportArgumentType] - grpc's types know blocking handlers alone
        pb.ProcessingRequest.FromString,
        pb.ProcessingResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Process": handler}),))
    try:
        if tls is None:
            bound = server.add_insecure_port(f"{host}:{port}")
        else:
            bound = server.add_secure_port(f"{host}:{port}", grpc.ssl_server_credentials(**tls.grpc_arguments()))
    except RuntimeError:
        raise OSError(f"cannot listen on {host}:{port}. Choose another with --endpoint-picker-port.") from None
    await server.start()
    return server, bound


def _input_of(body: Mapping[str, Any]) -> GenerateInput | None:
    """The prompt of a body of OpenAI's; None where it has none that can be read here."""
    model = body.get("model") if isinstance(body.get("model"), str) else None
    messages, prompt, tools = body.get("messages"), body.get("prompt"), body.get("tools")
    if isinstance(messages, list):
        return GenerateInput(messages=messages, tools=tools if isinstance(tools, list) and tools else None, model=model)
    if isinstance(prompt, str) and prompt:
        return GenerateInput(text=prompt, model=model)
    if isinstance(prompt, list) and prompt and all(isinstance(one, int) for one in prompt):
        return GenerateInput(token_ids=prompt, model=model)
    return None


def _body_pieces(body: bytes, last: bool, duplex: bool) -> list[pb.BodyResponse]:
    """A body as it came: handed back in pieces where it streams, left alone where it does not."""
    if not duplex:
        return [pb.BodyResponse()]
    starts = range(0, len(body), PIECE_BYTES) or (0,)
    pieces = [body[start : start + PIECE_BYTES] for start in starts]
    return [
        pb.BodyResponse(
            response=pb.CommonResponse(
                body_mutation=pb.BodyMutation(
                    streamed_response=pb.StreamedBodyResponse(body=piece, end_of_stream=last and i == len(pieces) - 1)
                )
            )
        )
        for i, piece in enumerate(pieces)
    ]


def _mutation(headers: list[tuple[str, str]]) -> pb.HeaderMutation:
    return pb.HeaderMutation(
        set_headers=[
            pb.HeaderValueOption(header=pb.HeaderValue(key=name, raw_value=value.encode()), append_action=_OVERWRITE)
            for name, value in headers
        ]
    )


def _refusal(error: RequestError) -> pb.ProcessingResponse:
    failure = failure_of(error)
    headers = [("content-type", "application/json"), *(failure.headers or {}).items()]
    return pb.ProcessingResponse(
        immediate_response=pb.ImmediateResponse(
            status=pb.HttpStatus(code=failure.status),
            headers=_mutation(headers),
            body=json.dumps(error_body(failure)).encode(),
            details="endpoint_picker",
        )
    )


def _texts(value: struct_pb2.Value) -> list[str]:
    if value.HasField("list_value"):
        return [one.string_value for one in value.list_value.values]
    return [one.strip() for one in value.string_value.split(",") if one.strip()]
