"""The HTTP application: routes, failures, and what surrounds every request."""

from __future__ import annotations

import contextlib
import pathlib
import socket
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi

from serving.access import Access, ServerTls
from serving.frontends.anthropic.protocol import CountTokensRequest, MessagesRequest
from serving.frontends.anthropic.routes import messages_router
from serving.frontends.anthropic.routes import models_router as anthropic_models_router
from serving.frontends.dialects import ERROR_SHAPES
from serving.frontends.http.access import RequireKey
from serving.frontends.http.arrivals import LocalNames, Spellings
from serving.frontends.http.bodies import schemas_of
from serving.frontends.http.body_limit import BodyLimit
from serving.frontends.http.direct import inside, post
from serving.frontends.http.errors import install
from serving.frontends.http.middleware import RequestContext
from serving.frontends.http.server import HttpServer, serve_app
from serving.frontends.ollama import protocol as ollama
from serving.frontends.ollama.embeddings import embeddings_router as ollama_embeddings_router
from serving.frontends.ollama.models import models_router as ollama_models_router
from serving.frontends.ollama.routes import generation_router
from serving.frontends.openai.audio import audio_router
from serving.frontends.openai.batches.files import Files, files_router
from serving.frontends.openai.batches.routes import BatchRequest, batches_router
from serving.frontends.openai.batches.running import Batches
from serving.frontends.openai.chat import chat_router
from serving.frontends.openai.classify import classify_router
from serving.frontends.openai.completions import completions_router
from serving.frontends.openai.embeddings import embeddings_router
from serving.frontends.openai.models import models_router
from serving.frontends.openai.protocol.chat import ChatRequest
from serving.frontends.openai.protocol.classify import ClassifyRequest
from serving.frontends.openai.protocol.completions import CompletionRequest
from serving.frontends.openai.protocol.embeddings import EmbeddingRequest
from serving.frontends.openai.protocol.others import CohereEmbedRequest
from serving.frontends.openai.protocol.scores import RerankRequest, ScoreRequest
from serving.frontends.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest
from serving.frontends.openai.responses.background import Background
from serving.frontends.openai.responses.conversations import ConversationRequest, ItemsRequest, conversations_router
from serving.frontends.openai.responses.protocol import ResponsesRequest
from serving.frontends.openai.responses.routes import responses_router
from serving.frontends.openai.scores import scores_router
from serving.frontends.openai.tokens import tokens_router
from serving.frontends.operations.adapters import LoadAdapterRequest, UnloadAdapterRequest, adapters_router
from serving.frontends.operations.control import UpdateWeightsRequest, control_router
from serving.frontends.operations.residence import ModelRequest, residence_router
from serving.frontends.operations.status import status_router
from serving.frontends.page.documents import documents_router
from serving.frontends.page.page import page_paths, page_router
from serving.metrics import Metrics
from serving.service import Served
from serving.storage import Store


def create_app(
    served: Served,
    *,
    metrics: Metrics | None = None,
    access: Access | None = None,
    cors_origins: tuple[str, ...] = (),
    allowed_hosts: tuple[str, ...] = (),
    root_path: str = "",
    force_usage: bool = False,
    page: bool = True,
    lora_folder: pathlib.Path | None = None,
    store: Store | None = None,
) -> FastAPI:
    """All that is served over HTTP as an ASGI application over `served`: OpenAI's API, Anthropic's, Ollama's, the server's own.

    Args:
        served: a `TextService`, or several under their names.
        metrics: what `/metrics` shows; None makes one over the services' engines (see serving.metrics).
        access: the keys that requests must bring; None asks for none.
        cors_origins: origins whose web pages may call us; "*" is all of them.
        allowed_hosts: names that a server without keys answers to beside local ones; "*" is all of them.
        root_path: what a proxy in front puts before every path; requests may come with it or without.
        force_usage: end every stream with token counts, whatever its `stream_options` say.
        page: serve the playground at `/`.
        lora_folder: below which adapters lie that admins may load; None: they may load none.
        store: where responses, conversations, files and batches are kept; None: nothing is.
    """
    metrics = metrics or Metrics.of(*(service.client for service in served.services))
    # FastAPI's own documentation pages load scripts from a CDN: left out. /openapi.json stays.
    app = FastAPI(
        title="jaxserve",
        version=served.first.info.version,
        docs_url=None,
        redoc_url=None,
        root_path=root_path,
        redirect_slashes=False,  # its redirects are put together from the Host header; `Spellings` takes the slash off
    )
    install(app, ERROR_SHAPES)
    app.state.limits = served.limits
    app.state.force_usage = force_usage
    app.state.stalled_reader_s = served.limits.stalled_reader_s
    kept = _Kept(store, served)
    routers = _routers(served, metrics, access or Access(), lora_folder, kept)
    if page:
        routers += [page_router(), documents_router()]
    for router in routers:
        app.include_router(router)
    app.add_middleware(BodyLimit, limits=served.limits)
    app.add_middleware(RequireKey, access=access or Access(), open_paths=page_paths() if page else frozenset())
    if not (access and access.keys):
        app.add_middleware(LocalNames, allowed=allowed_hosts)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.state.routes = routes = [route for router in routers for route in router.routes]
    app.add_middleware(RequestContext, on_request=metrics.http_request, routes=routes)
    app.add_middleware(Spellings)
    app.state.batches = kept.batches
    if kept.batches is not None:
        kept.batches.app = inside(app)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    return app


class _Kept:
    """What is kept between requests, and runs without them; without a store there are no files and no batches."""

    def __init__(self, store: Store | None, served: Served) -> None:
        self.store = store
        self.background = Background()
        self.files = self.batches = None
        if store is not None:
            self.files = Files(store)
            self.batches = Batches(store, self.files, max(1, served.first.info.max_num_seqs // 2))
            store.closing += [self.background.stop, self.batches.stop]


def _routers(
    served: Served, metrics: Metrics, access: Access, lora_folder: pathlib.Path | None, kept: _Kept
) -> list[APIRouter]:
    """The routes of all dialects and the server's own; the first that takes a request has it."""
    return [
        status_router(served, metrics, access),
        anthropic_models_router(served),  # sees Anthropic's clients alone
        models_router(served),
        chat_router(served),
        completions_router(served),
        responses_router(served, kept.store, kept.background),
        conversations_router(kept.store),
        files_router(kept.store, kept.files),
        batches_router(kept.store, kept.files, kept.batches),
        messages_router(served),
        generation_router(served),
        ollama_models_router(served),
        ollama_embeddings_router(served),
        embeddings_router(served),
        scores_router(served),
        classify_router(served),
        audio_router(served),
        tokens_router(served),
        control_router(served, access),
        adapters_router(served, access, lora_folder),
        residence_router(served, access),
    ]


REQUESTS = (
    ChatRequest, CompletionRequest, ResponsesRequest, EmbeddingRequest, ScoreRequest, RerankRequest, TokenizeRequest,
    DetokenizeRequest, UpdateWeightsRequest, CohereEmbedRequest, ClassifyRequest, LoadAdapterRequest, UnloadAdapterRequest,
    MessagesRequest, CountTokensRequest, ollama.ChatBody, ollama.GenerateBody, ollama.EmbedBody, ollama.EmbeddingsBody,
    ollama.NamedModel, ConversationRequest, ItemsRequest, BatchRequest, ModelRequest,
)  # fmt: skip
REHEARSED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/messages",
    "/api/chat",
)


async def rehearse(app: FastAPI) -> None:
    """Has FastAPI put the routes of `REHEARSED` together, which it does at a route's first request (8 ms of a first chat's). Their
    bodies are not JSON, so no request comes of it, and what logs and counts requests is not passed. Batches that an earlier run of
    the server did not end go on."""
    if app.state.batches is not None:
        await app.state.batches.resume()
    routes = AsyncExitStackMiddleware(app.router)
    for path in REHEARSED:
        with contextlib.suppress(Exception):  # a RequestValidationError; and whatever it is, a client would see it too
            headers = ((b"content-type", b"application/json"),)
            await post(routes, path, b"{", headers, {"app": app, "state": {"request_id": ""}})


async def serve_http(
    served: Served,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tls: ServerTls | None = None,
    sock: socket.socket | None = None,
    **options: Any,
) -> HttpServer:
    """Starts the OpenAI API in the running event loop and returns once it listens.

    Args:
        tls: serve https with these files.
        options: further ones of `create_app`.
        host, port, sock: where; see `serving.frontends.http.server.serve_app`.
    Raises:
        OSError: the port is taken, or the host is not ours.
    """
    app = create_app(served, **options)
    await rehearse(app)
    return await serve_app(app, served.limits, host=host, port=port, tls=tls, sock=sock)


def _document(app: FastAPI) -> dict[str, Any]:
    """The API document, without the 422 that FastAPI adds: wrong fields are 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas_of(REQUESTS))
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for unused in ("HTTPValidationError", "ValidationError"):
            document.get("components", {}).get("schemas", {}).pop(unused, None)
        app.openapi_schema = document
    return app.openapi_schema
