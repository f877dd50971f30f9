"""/v1/conversations: items that several responses read and add to."""

from __future__ import annotations

import time
import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from serving.errors import invalid
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.http.models import ApiBody, Many
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.responses.items import as_items, listed
from serving.frontends.openai.responses.state import CONVERSATION, need_store, not_found, tenant_of_task
from serving.storage import Entry, Store

MAX_ITEMS = 20
"""In one request; OpenAI's bound."""
MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512


class ConversationRequest(ApiBody):
    items: Many[dict[str, Any]] | None = None
    metadata: dict[str, str] | None = None


class ItemsRequest(ApiBody):
    items: Many[dict[str, Any]]


Body = Annotated[ConversationRequest, Depends(body_of(ConversationRequest))]
Items = Annotated[ItemsRequest, Depends(body_of(ItemsRequest))]


def conversations_router(store: Store | None) -> APIRouter:
    """The conversations of the tenant that asks."""
    router = APIRouter(tags=["conversations"], responses=RESPONSES)

    async def find(conversation: str) -> Entry:
        entry = await need_store(store).get(tenant_of_task(), CONVERSATION, conversation)
        if entry is None:
            raise not_found(CONVERSATION, conversation)
        return entry

    async def items_of(conversation: str) -> list[dict[str, Any]]:
        items = await need_store(store).items(tenant_of_task(), CONVERSATION, conversation)
        if items is None:
            raise not_found(CONVERSATION, conversation)
        return items

    @router.post("/v1/conversations", openapi_extra=takes(ConversationRequest))
    async def create(body: Body) -> Response:
        """Begins a conversation, empty or with items."""
        kept = need_store(store)
        items, made_id = _checked(body.items or []), f"conv_{uuid.uuid4().hex}"
        made = {"id": made_id, "object": "conversation", "created_at": int(time.time()), "metadata": _metadata(body)}
        await kept.put(tenant_of_task(), Entry(CONVERSATION, made_id, made))
        await kept.add_items(tenant_of_task(), CONVERSATION, made_id, items)
        return JSONResponse(made)

    @router.get("/v1/conversations/{conversation_id}")
    async def retrieve(conversation_id: str) -> Response:
        """The conversation without its items."""
        return JSONResponse((await find(conversation_id)).body)

    @router.post("/v1/conversations/{conversation_id}", openapi_extra=takes(ConversationRequest))
    async def update(conversation_id: str, body: Body) -> Response:
        """Puts other metadata in the place of the old."""
        made = {**(await find(conversation_id)).body, "metadata": _metadata(body)}
        await need_store(store).put(tenant_of_task(), Entry(CONVERSATION, conversation_id, made))
        return JSONResponse(made)

    @router.delete("/v1/conversations/{conversation_id}")
    async def delete(conversation_id: str) -> Response:
        """Forgets a conversation and its items."""
        if not await need_store(store).delete(tenant_of_task(), CONVERSATION, conversation_id):
            raise not_found(CONVERSATION, conversation_id)
        return JSONResponse({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @router.post("/v1/conversations/{conversation_id}/items", openapi_extra=takes(ItemsRequest))
    async def add(conversation_id: str, body: Items) -> Response:
        """Adds items at its end."""
        items = _checked(body.items)
        if not await need_store(store).add_items(tenant_of_task(), CONVERSATION, conversation_id, items):
            raise not_found(CONVERSATION, conversation_id)
        return JSONResponse(listed(items, max(len(items), 1), None, newest_first=False))

    @router.get("/v1/conversations/{conversation_id}/items")
    async def items(
        conversation_id: str, limit: int = 20, after: str | None = None, order: Literal["asc", "desc"] = "desc"
    ) -> Response:
        """Its items, a page of them."""
        return JSONResponse(listed(await items_of(conversation_id), limit, after, order == "desc"))

    @router.get("/v1/conversations/{conversation_id}/items/{item_id}")
    async def item(conversation_id: str, item_id: str) -> Response:
        """One of its items."""
        found = next((one for one in await items_of(conversation_id) if one["id"] == item_id), None)
        if found is None:
            raise not_found("item", item_id)
        return JSONResponse(found)

    @router.delete("/v1/conversations/{conversation_id}/items/{item_id}")
    async def delete_item(conversation_id: str, item_id: str) -> Response:
        """Forgets one of its items; answers with the conversation."""
        found = await find(conversation_id)
        if not await need_store(store).delete_item(tenant_of_task(), CONVERSATION, conversation_id, item_id):
            raise not_found("item", item_id)
        return JSONResponse(found.body)

    return router


def _checked(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if len(items) > MAX_ITEMS:
        raise invalid(f"items has {len(items)} entries; at most {MAX_ITEMS} are taken at once.", "items")
    return as_items(items)


def _metadata(body: ConversationRequest) -> dict[str, str]:
    given = body.metadata or {}
    if len(given) > MAX_METADATA or any(
        len(k) > MAX_METADATA_KEY or len(v) > MAX_METADATA_VALUE for k, v in given.items()
    ):
        raise invalid(
            f"metadata takes {MAX_METADATA} entries, names of {MAX_METADATA_KEY} characters and texts of {MAX_METADATA_VALUE}.",
            "metadata",
        )
    return given
