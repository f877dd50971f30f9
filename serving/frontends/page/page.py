"""The playground: one page and its files, which anybody may read. What it does it does by the API, with the key of its reader."""

from __future__ import annotations

import functools
import pathlib

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException

STATIC = pathlib.Path(__file__).parent / "static"

POLICY = "; ".join((
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data:", "media-src data:",
    "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
))  # fmt: skip
"""The page loads nothing from elsewhere, talks to nobody else, and runs no script and no style but its own files'. With
trusted types a browser refuses to turn any text into markup: a model cannot say anything that becomes one. Images and sound
of `data:` are those that a reader has attached; pictures in what a model says are links."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # asks whether it changed: a server of another version has another page
}

TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}
"""Not left to the system's table, where a machine may have no or another type for scripts, which browsers then refuse."""


@functools.cache
def page_files() -> dict[str, pathlib.Path]:
    """The paths that the page's files are served at."""
    files = [file for file in sorted(STATIC.rglob("*")) if file.is_file() and file.suffix in TYPES]
    found = {f"/static/{file.relative_to(STATIC).as_posix()}": file for file in files}
    return {"/": STATIC / "index.html", "/favicon.ico": STATIC / "icon.svg", **found}


def page_paths() -> frozenset[str]:
    """What may be read without a key, whole and as it stands: a page has to be there before it can ask for one."""
    return frozenset(page_files())


def page_router() -> APIRouter:
    """GET /, /favicon.ico and /static/..."""
    router = APIRouter(include_in_schema=False)

    def reply(path: str) -> Response:
        file = page_files().get(path)
        if file is None:
            raise HTTPException(404)
        return FileResponse(file, headers=HEADERS, media_type=TYPES[file.suffix])

    @router.get("/")
    async def page() -> Response:
        return reply("/")

    @router.get("/favicon.ico")
    async def favicon() -> Response:
        return reply("/favicon.ico")

    @router.get("/static/{file:path}")
    async def static(file: str) -> Response:
        return reply(f"/static/{file}")

    return router
