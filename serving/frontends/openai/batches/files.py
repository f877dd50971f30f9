"""/v1/files: what batches read and write, each of the tenant that sent it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import time
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import UploadFile

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.responses.state import need_store, not_found, tenant_of_task
from serving.storage import Entry, Store

FILE = "file"
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")
MAX_NAME_CHARS = 256
MAX_PAGE = 10_000


class Files:
    """The contents of files, beside the store that knows of them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.folder / "files"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        store.removed_listeners.append(self._on_removed)

    def path(self, file_id: str) -> pathlib.Path:
        """Where a file's content lies; ids are made here, so none leads elsewhere."""
        return self._folder / file_id

    def make_id(self) -> str:
        return f"file-{uuid.uuid4().hex}"

    async def add(self, tenant: str, file_id: str, filename: str, purpose: str) -> dict[str, Any]:
        """Keeps the file whose content lies at `path`; returns what clients see of it."""
        size = self.path(file_id).stat().st_size
        body = {
            "id": file_id, "object": "file", "bytes": size, "created_at": int(time.time()), "filename": filename,
            "purpose": purpose, "status": "processed", "expires_at": None,
        }  # fmt: skip
        await self._store.put(tenant, Entry(FILE, file_id, body), extra_bytes=size)
        return body

    async def find(self, file_id: str, param: str | None = None) -> dict[str, Any]:
        """A file of the running request's tenant. Raises RequestError: NOT_FOUND."""
        entry = await self._store.get(tenant_of_task(), FILE, file_id)
        if entry is None:
            raise not_found(FILE, file_id, param)
        return entry.body

    def _on_removed(self, kind: str, entry_id: str) -> None:
        if kind == FILE:
            with contextlib.suppress(OSError):
                os.unlink(self.path(entry_id))


def files_router(store: Store | None, files: Files | None) -> APIRouter:
    """The files of the tenant that asks."""
    router = APIRouter(tags=["files"], responses=RESPONSES)
    form = {"multipart/form-data": {"schema": {
        "type": "object", "required": ["file", "purpose"],
        "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"type": "string", "enum": list(PURPOSES)}},
    }}}  # fmt: skip

    @router.post("/v1/files", openapi_extra={"requestBody": {"required": True, "content": form}})
    async def upload(request: Request) -> Response:
        """Keeps a file."""
        need_store(store)
        assert files is not None
        if request.headers.get("sec-fetch-site") in ("cross-site", "same-site"):
            raise RequestError(ErrorKind.PERMISSION_DENIED, "Web pages of other origins may send no files here.")
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("A file comes as multipart/form-data, with the fields file and purpose.", "file")
        async with request.form(max_files=1, max_fields=8) as sent:
            content, purpose = sent.get("file"), sent.get("purpose")
            if not isinstance(content, UploadFile):
                raise invalid("Missing required parameter: 'file'.", "file")
            if purpose not in PURPOSES:
                raise invalid(f"Invalid value for 'purpose': it takes {', '.join(PURPOSES)}.", "purpose")
            file_id = files.make_id()
            raw = await content.read()
            await asyncio.to_thread(_write, files.path(file_id), raw)
            name = "".join(c for c in content.filename or "file" if c.isprintable())[:MAX_NAME_CHARS]
        return JSONResponse(await files.add(tenant_of_task(), file_id, name, str(purpose)))

    @router.get("/v1/files")
    async def listing(
        purpose: str | None = None,
        limit: int = MAX_PAGE,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        """The files that there are."""
        if not 1 <= limit <= MAX_PAGE:
            raise invalid(f"limit must be between 1 and {MAX_PAGE}, got {limit}.", "limit")
        page = await need_store(store).page(tenant_of_task(), FILE, limit, after, order == "desc")
        found = [body for body in page.bodies if purpose is None or body["purpose"] == purpose]
        ends = {"first_id": found[0]["id"] if found else None, "last_id": found[-1]["id"] if found else None}
        return JSONResponse({"object": "list", "data": found, "has_more": page.has_more, **ends})

    @router.get("/v1/files/{file_id}")
    async def retrieve(file_id: str) -> Response:
        """What is known of a file."""
        need_store(store)
        assert files is not None
        return JSONResponse(await files.find(file_id))

    @router.get("/v1/files/{file_id}/content", responses={200: {"content": {"application/octet-stream": {}}}})
    async def content(file_id: str) -> Response:
        """What is in it."""
        need_store(store)
        assert files is not None
        await files.find(file_id)
        return FileResponse(files.path(file_id), media_type="application/octet-stream")

    @router.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Response:
        """Forgets a file."""
        if not await need_store(store).delete(tenant_of_task(), FILE, file_id):
            raise not_found(FILE, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return router


def _write(path: pathlib.Path, raw: bytes) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(raw)
