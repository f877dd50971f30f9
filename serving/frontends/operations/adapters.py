"""Routes that load and unload adapters, under vLLM's names. They need an admin key, and are closed without one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import Field

from serving.access import Access
from serving.frontends.http.access import control_check
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.models import ApiRequest, Many
from serving.frontends.openai.errors import RESPONSES
from serving.service import Served
from serving.service.adapter_control import AdapterControl

TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


class LoadAdapterRequest(ApiRequest):
    """Which adapter to serve, and as which model. `lora_path` lies below the server's --lora-folder; `tenants` are names of the
    keys that may use it, all of them where it is left out."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False
    tenants: Many[str] | None = None
    base_model_name: str | None = Field(default=None, description="The model that it is for, where there are several.")


class UnloadAdapterRequest(ApiRequest):
    """Which adapter to forget; `lora_int_id` is taken and not looked at."""

    lora_name: str
    lora_int_id: int | None = None


def adapters_router(served: Served, access: Access, folder: Path | None) -> APIRouter:
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter. They answer in text, as vLLM does."""
    responses: dict[int | str, dict[str, Any]] = {status: RESPONSES[status] for status in (400, 401, 403, 404, 409)}
    router = APIRouter(tags=["adapters"], dependencies=[Depends(control_check(access))], responses=responses)

    @router.post("/v1/load_lora_adapter", responses={**TEXT}, openapi_extra=takes(LoadAdapterRequest))
    async def load(body: Annotated[LoadAdapterRequest, Depends(body_of(LoadAdapterRequest))]) -> PlainTextResponse:
        tenants = None if body.tenants is None else tuple(body.tenants)
        control = AdapterControl(served.of(body.base_model_name), folder)
        await control.load(body.lora_name, body.lora_path, body.load_inplace, tenants)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", responses={**TEXT}, openapi_extra=takes(UnloadAdapterRequest))
    async def unload(
        body: Annotated[UnloadAdapterRequest, Depends(body_of(UnloadAdapterRequest))],
    ) -> PlainTextResponse:
        control = AdapterControl(served.of(body.lora_name), folder)
        await control.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
