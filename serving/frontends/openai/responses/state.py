"""What is kept of responses: what a new one follows on, and how it is kept itself."""

from __future__ import annotations

import logging
from typing import Any

from serving.access.keys import caller_of_task
from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.responses.items import as_items
from serving.frontends.openai.responses.protocol import ResponsesRequest
from serving.storage import Entry, Store

log = logging.getLogger(__name__)

RESPONSE, CONVERSATION = "response", "conversation"
MAX_CHAIN = 2048
RUNNING = ("queued", "in_progress")
NO_STORE = "this server keeps nothing: start it with --store-dir, or send the conversation in input."


def tenant_of_task() -> str:
    """Whose entries the running request may see: its key's; without keys they are everybody's."""
    caller = caller_of_task.get()
    return caller.name if caller else ""


def need_store(store: Store | None, param: str | None = None) -> Store:
    """The store, or the error for a server without one."""
    if store is None:
        what = f"{param} is not supported by this server" if param else "There is nothing kept"
        raise invalid(f"{what}: {NO_STORE}", param, "unsupported_parameter")
    return store


def not_found(kind: str, entry_id: str, param: str | None = None) -> RequestError:
    """The error for an entry that is not there, or is another tenant's."""
    return RequestError(
        ErrorKind.NOT_FOUND,
        f"There is no {kind} with the id {entry_id[:128]!r}.",
        param=param,
        code=f"{kind}_not_found",
    )


class ResponseState:
    """Responses and conversations of the tenant that the running request is of."""

    def __init__(self, store: Store | None) -> None:
        self._store = store

    def keeps(self, body: ResponsesRequest) -> bool:
        """Whether a response is to be kept.

        Raises:
            RequestError: INVALID_ARGUMENT: it needs what is not there, or contradicts itself.
        """
        for name in ("previous_response_id", "conversation"):
            if getattr(body, name) is not None:
                need_store(self._store, name)
        if body.background:
            need_store(self._store, "background")
            if body.store is False:
                raise invalid("background needs store: the response is to be asked for.", "store")
        if body.previous_response_id is not None and body.conversation is not None:
            raise invalid("previous_response_id and conversation exclude each other: give one.", "conversation")
        return self._store is not None and body.store is not False

    async def follow(self, body: ResponsesRequest) -> None:
        """Puts what a response follows on ahead of its input.

        Raises:
            RequestError: NOT_FOUND, INVALID_ARGUMENT.
        """
        store = self._store
        if store is None:
            return
        if body.previous_response_id is not None:
            body.follow(await self.context(body.previous_response_id, "previous_response_id"))
        elif body.conversation_id is not None:
            items = await store.items(tenant_of_task(), CONVERSATION, body.conversation_id)
            if items is None:
                raise not_found(CONVERSATION, body.conversation_id, "conversation")
            body.follow(items)
        if not isinstance(body.input, str) and any(item.get("type") == "item_reference" for item in body.input):
            body.input = [await self._referred(item, f"input[{i}]") for i, item in enumerate(body.input)]

    async def context(
        self, response_id: str, param: str | None = None, with_output: bool = True
    ) -> list[dict[str, Any]]:
        """All that was read and written up to a response.

        Args:
            with_output: False ends in front of what it wrote itself.
        Raises:
            RequestError: NOT_FOUND: it, or one before it, is not there; FAILED_PRECONDITION: it has not ended.
        """
        store = need_store(self._store)
        chain = await store.chain(tenant_of_task(), RESPONSE, response_id, "previous_response_id", MAX_CHAIN)
        if not chain:
            raise not_found(RESPONSE, response_id, param)
        if with_output and chain[-1].body["status"] in RUNNING:
            raise RequestError(
                ErrorKind.FAILED_PRECONDITION,
                f"The response {response_id!r} has not ended yet. Wait for it.",
                param=param,
            )
        first = chain[0].data["before"] if chain[0].data else []
        found: list[dict[str, Any]] = [*first]
        for entry in chain:
            found += entry.data["input"]
            if entry is not chain[-1] or with_output:
                found += entry.body["output"]
        return found

    async def save(self, body: ResponsesRequest, response: dict[str, Any], events: list[str] | None = None) -> None:
        """Keeps a response, and puts what was said into its conversation. A response that cannot be kept is an answer all the same:
        the log tells.

        Args:
            events: of one that ran in the background, to be read again.
        """
        store, tenant = need_store(self._store), tenant_of_task()
        given = as_items(body.input)
        before = body.earlier if body.conversation_id is not None else []
        try:
            data = {"input": given, "before": before, "events": events}
            await store.put(tenant, Entry(RESPONSE, response["id"], response, data))
            if body.conversation_id is not None and response["status"] not in RUNNING:
                await store.add_items(
                    tenant, CONVERSATION, body.conversation_id, [*given, *response["output"]], skip_known=True
                )
        except Exception:
            log.exception("the response %s could not be kept", response["id"])

    async def _referred(self, item: dict[str, Any], where: str) -> dict[str, Any]:
        """An item itself, or the one that it refers to: its id holds that of the response that it is of."""
        if item.get("type") != "item_reference":
            return item
        item_id = item.get("id")
        if isinstance(item_id, str):
            own = item_id.split("_", 1)[-1].rpartition("_")[0]
            entry = await need_store(self._store).get(tenant_of_task(), RESPONSE, f"resp_{own}")
            for one in entry.body["output"] if entry is not None else ():
                if one.get("id") == item_id:
                    return one
        raise not_found("item", str(item_id), f"{where}.id")
