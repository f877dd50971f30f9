"""/v1/models: what is served, adapters included."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.models import ModelCard, ModelList
from serving.service import TextService


def models_router(service: TextService) -> APIRouter:
    """Routes that list the served models."""
    router = APIRouter(tags=["server"])

    def card(name: str) -> ModelCard:
        adapter = service.adapters.find(name)
        return ModelCard(
            id=name,
            created=service.created,
            root=service.model_id if adapter is None else adapter.path,
            parent=None if adapter is None else service.model_id,
            max_model_len=service.info.max_model_len,
            default_sampling_params=service.default_params,
        )

    @router.get("/v1/models", response_model=ModelList)
    async def models() -> Response:
        """The model under the name that answers carry, then the adapters that the caller may use. Aliases answer too, and are not
        listed: front ends would show doubles."""
        adapters = [info.name for info in service.adapters.visible()]
        return JSONResponse(ModelList(data=[card(name) for name in (service.model_id, *adapters)]).model_dump())

    @router.get("/v1/models/{model:path}", response_model=ModelCard, responses={k: RESPONSES[k] for k in (400, 404)})
    async def model(model: str) -> Response:
        return JSONResponse(card(service.resolve_model(model)).model_dump())

    return router
