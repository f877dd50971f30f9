"""Texts of documents that a browser cannot read by itself: the page sends a PDF and gets its text, to be asked about."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serving.media.documents import text_of_pdf


def documents_router() -> APIRouter:
    """POST /page/pdf: the body is a PDF, the reply `{"text", "pages"}`. It asks for a key like every other route."""
    router = APIRouter(include_in_schema=False)

    @router.post("/page/pdf")
    async def pdf(request: Request) -> Response:
        return JSONResponse(await text_of_pdf(await request.body()))

    return router
