"""Texts of documents that a browser cannot read by itself: the page sends a PDF and gets its text, to be asked about."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from serving.errors import ErrorKind, RequestError, invalid
from serving.frontends.page import pdf_worker

DEADLINE_S = 30.0
AT_ONCE = 2
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")


def documents_router() -> APIRouter:
    """POST /page/pdf: the body is a PDF, the reply `{"text", "pages"}`. It asks for a key like every other route."""
    router = APIRouter(include_in_schema=False)
    turns = asyncio.Semaphore(AT_ONCE)

    @router.post("/page/pdf")
    async def pdf(request: Request) -> Response:
        if importlib.util.find_spec("pypdf") is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED,
                "This server reads no PDF: its operator can add that with pip install pypdf.",
            )
        data = await request.body()
        if b"%PDF-" not in data[:1024]:
            raise invalid("The document cannot be used: it is no PDF.")
        async with turns:
            found = await _read(data)
        if "error" in found:
            raise invalid(f"The document cannot be used: {found['error']}")
        return JSONResponse(found)

    return router


async def _read(data: bytes) -> dict[str, Any]:
    """What the worker says; it is killed behind the deadline, or when nobody waits any more."""
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-P", str(pdf_worker.__file__),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        env={name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = await asyncio.wait_for(worker.communicate(data), DEADLINE_S)
        return json.loads(out)
    except TimeoutError:
        return {"error": f"reading it takes longer than {DEADLINE_S:.0f} seconds."}
    except ValueError:  # it ended without an answer
        return {"error": "reading it needs more memory than it is given."}
    finally:
        with contextlib.suppress(ProcessLookupError):
            worker.kill()
        await worker.wait()
