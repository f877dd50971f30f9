"""/v1/models: what is served, adapters included."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serving.engine.api.types import EngineInfo
from serving.frontends.http.status import status_of
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.models import ModelCard, ModelList
from serving.service import Served, TextService


def models_router(served: Served) -> APIRouter:
    """Routes that list the served models."""
    router = APIRouter(tags=["server"])

    def card(service: TextService, name: str) -> ModelCard:
        adapter = service.adapters.find(name)
        card = ModelCard(
            id=name,
            created=service.created,
            root=service.model_id if adapter is None else adapter.path,
            parent=None if adapter is None else service.model_id,
            max_model_len=service.info.max_model_len,
            tasks=list(service.info.tasks),
            input_modalities=_reads(service.info),
            default_sampling_params=service.default_params,
        )
        return card if service.client.residence is None else card.model_copy(update={"status": status_of(service)})

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """Each model under the name that answers carry, with the adapters that the caller may use; where several share the
        server, whether it is loaded."""
        cards = [card(service, name) for service in served.visible() for name in service.listed()]
        return JSONResponse(ModelList(data=cards).model_dump())

    @router.get("/v1/models/{model:path}", response_model=ModelCard, responses={k: RESPONSES[k] for k in (400, 404)})
    async def model(model: str) -> Response:
        service = served.of(model)
        return JSONResponse(card(service, service.resolve_model(model)).model_dump())

    return router


def _reads(info: EngineInfo) -> list[str]:
    """What a model reads, in the words of OpenAI's `modalities`."""
    text = [] if "transcribe" in info.tasks else ["text"]
    return text + ["audio" if sense == "sound" else sense for sense in info.modalities]
