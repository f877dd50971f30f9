"""What tells about models and the server: /api/tags, /api/ps, /api/show, /api/version; and /api/pull of what is served."""

from __future__ import annotations

import datetime
import hashlib
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from serving.engine.api.client import Where
from serving.errors import invalid
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.ollama.errors import RESPONSES
from serving.frontends.ollama.protocol import ModelReply, NamedModel, OllamaModels, model_name
from serving.service import Served, TextService

API_VERSION = "0.12.6"
"""The release of Ollama whose API this is: front ends look whether it is new enough for them."""

_NEVER = datetime.timedelta(days=36525)
_BITS = {"int8": 8, "int4": 4, "stored": 5, "fp8": 8, "float8": 8}
_DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


def models_router(served: Served) -> APIRouter:
    """The routes that change nothing."""
    router = APIRouter(tags=["ollama"], responses={status: RESPONSES[status] for status in (400, 401, 404)})

    @router.get("/api/version")
    async def version() -> Response:
        return JSONResponse({"version": API_VERSION})

    @router.get("/api/tags", response_model=OllamaModels)
    async def tags() -> Response:
        """The served models."""
        return JSONResponse({"models": [_Facts(one).card(name) for one in served.visible() for name in one.listed()]})

    @router.get("/api/ps", response_model=OllamaModels)
    async def running() -> Response:
        """The models that are loaded. The only one of a server stays."""
        return JSONResponse({"models": [card for one in served.visible() for card in _Facts(one).running()]})

    @router.post("/api/show", response_model=ModelReply, openapi_extra=takes(NamedModel))
    async def show(body: Annotated[NamedModel, Depends(body_of(NamedModel, untyped=True))]) -> Response:
        """What a model is and can do."""
        service, name = _resolved(served, body)
        return JSONResponse(_Facts(service).whole(name))

    @router.post("/api/pull", openapi_extra=takes(NamedModel))
    async def pull(body: Annotated[NamedModel, Depends(body_of(NamedModel, untyped=True))]) -> Response:
        """Front ends ask for a model before they use it: one that is served is there. Others are not fetched."""
        _resolved(served, body)
        return JSONResponse({"status": "success"})

    return router


def _resolved(served: Served, body: NamedModel) -> tuple[TextService, str]:
    name = body.model or body.name
    if not name:
        raise invalid("Missing required parameter: 'model'.", "model")
    service = served.of(model_name(name))
    return service, service.resolve_model(model_name(name))


class _Facts:
    """Models as Ollama's clients show them."""

    def __init__(self, service: TextService) -> None:
        self._service = service

    def running(self) -> list[dict[str, Any]]:
        """The cards of what is loaded, with when it goes."""
        residence = self._service.client.residence
        if residence is not None and residence.where is not Where.LOADED:
            return []
        idle = None if residence is None else residence.idle_until_s
        now = datetime.datetime.now(datetime.UTC)
        end = now + datetime.timedelta(seconds=idle) if idle is not None else self._created() + _NEVER
        more = {"expires_at": _when(end), "context_length": self._service.info.max_model_len}
        cards = [self.card(name) for name in self._service.listed()]
        return [{**card, **more, "size_vram": card["size"]} for card in cards]

    def _created(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._service.created, datetime.UTC)

    def card(self, name: str) -> dict[str, Any]:
        return {
            "name": name, "model": name, "modified_at": _when(self._created()), "size": self._bytes(),
            "digest": hashlib.sha256(f"{self._service.info.model_id}:{name}".encode()).hexdigest(),
            "details": self._details(name),
        }  # fmt: skip

    def whole(self, name: str) -> dict[str, Any]:
        info = self._service.info
        family = info.architecture
        return {
            "modelfile": f"FROM {self._service.model_id}",
            "parameters": "\n".join(f"{key} {value}" for key, value in self._service.default_params.items()),
            "template": getattr(self._service.chat_template, "source", None) or "",
            "details": self._details(name),
            "model_info": {
                "general.architecture": family,
                "general.parameter_count": info.num_parameters,
                "general.basename": name,
                f"{family}.context_length": info.max_model_len,
                f"{family}.vocab_size": info.vocab_size,
            },
            "capabilities": self._capabilities(),
            "modified_at": self.card(name)["modified_at"],
        }

    def _capabilities(self) -> list[str]:
        info = self._service.info
        if "transcribe" in info.tasks:
            return ["audio"]
        if "generate" not in info.tasks:
            return ["embedding"]
        sees = ["vision"] if "image" in info.modalities else []
        thinks = ["thinking"] if self._service.voice().style.reasoning is not None else []
        tools = ["tools"] if self._service.chat_template is not None else []
        return ["completion", *tools, *thinks, *sees]

    def _details(self, name: str) -> dict[str, Any]:
        info = self._service.info
        count = info.num_parameters
        size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.0f}M"
        return {
            "parent_model": "" if name == self._service.model_id else self._service.model_id,
            "format": "jax", "family": info.architecture, "families": [info.architecture],
            "parameter_size": size, "quantization_level": (info.quantization or info.dtype).upper(),
        }  # fmt: skip

    def _bytes(self) -> int:
        """About what its weights take: their number times the width they are kept in."""
        info = self._service.info
        return info.num_parameters * _BITS.get(info.quantization or "", _DTYPE_BITS.get(info.dtype, 16)) // 8


def _when(time: datetime.datetime) -> str:
    return time.isoformat().replace("+00:00", "Z")
