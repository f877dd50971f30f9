"""Texts of files: of PDFs by a process of its own, with a deadline and a memory limit; of text files as they are."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import sys
from typing import Any

from serving.errors import ErrorKind, RequestError, invalid
from serving.media import pdf_worker

DEADLINE_S = 30.0
AT_ONCE = 2
KEPT_VARIABLES = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL")
_turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


async def text_of_pdf(data: bytes, place: str | None = None) -> dict[str, Any]:
    """{"text", "pages"} of a PDF.

    Args:
        place: of the file in the request, for errors.
    Raises:
        RequestError: INVALID_ARGUMENT: none, locked, damaged, slow, or without text; UNIMPLEMENTED without pypdf.
    """
    if importlib.util.find_spec("pypdf") is None:
        raise RequestError(
            ErrorKind.UNIMPLEMENTED, "This server reads no PDF: its operator can add that with pip install pypdf."
        )
    if b"%PDF-" not in data[:1024]:
        raise invalid("The document cannot be used: it is no PDF.", place)
    loop = asyncio.get_running_loop()
    for closed in [one for one in _turns if one.is_closed()]:
        del _turns[closed]
    async with _turns.setdefault(loop, asyncio.Semaphore(AT_ONCE)):
        found = await _read(data)
    if "error" in found:
        raise invalid(f"The document cannot be used: {found['error']}", place)
    return found


async def text_of_file(data: bytes, place: str) -> str:
    """The text of a PDF or of a text file.

    Raises:
        RequestError: as `text_of_pdf`; INVALID_ARGUMENT for one that is neither.
    """
    if b"%PDF-" in data[:1024]:
        return (await text_of_pdf(data, place))["text"]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        raise invalid(f"{place}: the file is neither a PDF nor text in UTF-8.", place)
    return text


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
