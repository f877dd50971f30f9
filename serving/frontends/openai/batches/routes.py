"""/v1/batches: files of requests that the server runs when there is room, and keeps the answers of."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from serving.errors import invalid
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.models import ApiBody
from serving.frontends.openai.batches.files import Files
from serving.frontends.openai.batches.running import BATCH, ENDED, Batches
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.responses.state import need_store, not_found, tenant_of_task
from serving.storage import Store

WINDOW_S = 24 * 3600
MAX_PAGE = 100


class BatchRequest(ApiBody):
    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: dict[str, str] | None = None


Body = Annotated[BatchRequest, Depends(body_of(BatchRequest))]


def batches_router(store: Store | None, files: Files | None, batches: Batches | None) -> APIRouter:
    """The batches of the tenant that asks."""
    router = APIRouter(tags=["batches"], responses=RESPONSES)

    async def find(batch_id: str) -> dict[str, Any]:
        entry = await need_store(store).get(tenant_of_task(), BATCH, batch_id)
        if entry is None:
            raise not_found(BATCH, batch_id)
        assert batches is not None
        return batches.live(batch_id) or entry.body

    @router.post("/v1/batches", openapi_extra=takes(BatchRequest))
    async def create(body: Body) -> Response:
        """Begins a batch: its lines are looked at first, then run."""
        need_store(store)
        assert files is not None and batches is not None
        if (await files.find(body.input_file_id, "input_file_id"))["purpose"] != "batch":
            raise invalid("The file was not sent with the purpose batch.", "input_file_id")
        now = int(time.time())
        later = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        batch: dict[str, Any] = {
            "id": f"batch_{uuid.uuid4().hex}", "object": "batch", "endpoint": body.endpoint, "errors": None,
            "input_file_id": body.input_file_id, "completion_window": "24h", "status": "validating",
            "output_file_id": None, "error_file_id": None, "created_at": now, "expires_at": now + WINDOW_S,
            **{f"{name}_at": None for name in later}, "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.metadata,
        }  # fmt: skip
        reply = dict(batch)
        await batches.start(batch)
        return JSONResponse(reply)

    @router.get("/v1/batches")
    async def listing(limit: int = 20, after: str | None = None) -> Response:
        """The batches that there are, the newest first."""
        if not 1 <= limit <= MAX_PAGE:
            raise invalid(f"limit must be between 1 and {MAX_PAGE}, got {limit}.", "limit")
        page = await need_store(store).page(tenant_of_task(), BATCH, limit, after)
        found = page.bodies
        ends = {"first_id": found[0]["id"] if found else None, "last_id": found[-1]["id"] if found else None}
        return JSONResponse({"object": "list", "data": found, "has_more": page.has_more, **ends})

    @router.get("/v1/batches/{batch_id}")
    async def retrieve(batch_id: str) -> Response:
        """How far a batch is."""
        return JSONResponse(await find(batch_id))

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Response:
        """Ends a batch; what it has answered is kept."""
        batch = await find(batch_id)
        if batch["status"] in ENDED:
            raise invalid(f"The batch has ended: it is {batch['status']}.", "batch_id")
        assert batches is not None
        await batches.cancel(batch_id)
        return JSONResponse(await find(batch_id))

    return router
