"""From a request's body to its model: read, counted, parsed and checked, a large one on a thread of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.requests import ClientDisconnect

from serving import memory
from serving.errors import invalid
from serving.frontends.http.models import ApiBody
from serving.frontends.http.sse import ClientGoneError
from serving.frontends.http.validation import error_of
from serving.service import Limits
from serving.service.requests.json_bounds import read_json

LARGE_BYTES = 64 * 1024
"""A larger body is parsed and checked off the event loop, one at a time."""

_REF = "#/components/schemas/{model}"
_executor = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-body")
M = TypeVar("M", bound=BaseModel)


def body_of(model: type[M], untyped: bool = False) -> Callable[[Request], Coroutine[Any, Any, M]]:
    """A dependency that gives the request's body as `model`. FastAPI's own way does everything on the event loop, every element
    of every list before the list's length, and every error before the first is told.

    Args:
        untyped: a client that is no browser need not say that its body is JSON, as some of the dialect's do not.
    Raises (the dependency):
        RequestError: INVALID_ARGUMENT naming the field.
        ClientGoneError: the client went while its body came.
    """

    async def read(request: Request) -> M:
        limits: Limits = request.app.state.limits
        try:
            raw = b"".join([piece async for piece in request.stream()])
        except ClientDisconnect:
            raise ClientGoneError from None
        if not untyped or any(name in request.headers for name in _BROWSERS):
            _check_type(request, raw)
        if len(raw) <= LARGE_BYTES:
            body = parse(model, raw, limits)
        else:
            memory.note_peak(16 * len(raw))
            body = await asyncio.get_running_loop().run_in_executor(_executor, parse, model, raw, limits)
        if request.app.state.force_usage and isinstance(body, ApiBody):
            body.force_usage()
        return body

    return read


def parse(model: type[M], raw: bytes, limits: Limits) -> M:
    """A body's bytes as `model`.

    Raises:
        RequestError: INVALID_ARGUMENT naming the field.
    """
    if not raw:
        raise invalid("A JSON body is required.")
    value = read_json(raw, limits)
    if not isinstance(value, dict):
        raise invalid("The body must be a JSON object.")
    for name, what, bound in COUNTS:
        entry = value.get(name)
        if isinstance(entry, list | dict):
            most = bound(limits)
            if name in _MAY_BE_IDS and isinstance(entry, list) and (not entry or isinstance(entry[0], int)):
                most = limits.max_prompt_chars
            limits.check_count(what, len(entry), most, name)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise error_of(error) from None
    except RecursionError:
        raise invalid("The body is nested too deeply.") from None


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """A route's `openapi_extra`: its body is `model`."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def schemas_of(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The schemas of request models and of all they refer to, for the API document's components."""
    _, found = models_json_schema([(model, "validation") for model in models], ref_template=_REF)
    return found.get("$defs", {})


_BROWSERS = frozenset({"origin", "sec-fetch-site"})
"""Every browser says one of these of what a page posts."""


def _check_type(request: Request, raw: bytes) -> None:
    """Only JSON that says so: a web page can send any other body anywhere without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if raw and kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise invalid("The body must be a JSON object, sent with Content-Type: application/json.")


def _many(name: str, what: str, bound: Callable[[Limits], int]) -> tuple[str, str, Callable[[Limits], int]]:
    return name, what, bound


COUNTS = (
    _many("messages", "messages", lambda limits: limits.max_messages),
    _many("tools", "tools", lambda limits: limits.max_tools),
    _many("functions", "tools", lambda limits: limits.max_tools),
    _many("stop", "stop strings", lambda limits: limits.max_stop_strings),
    _many("stop_sequences", "stop strings", lambda limits: limits.max_stop_strings),
    _many("system", "blocks", lambda limits: limits.max_content_parts),
    _many("images", "images", lambda limits: limits.max_content_parts),
    _many("prompt", "prompts", lambda limits: limits.max_batch),
    _many("input", "inputs", lambda limits: max(limits.max_batch, limits.max_messages)),
    _many("tokens", "token ids", lambda limits: limits.max_prompt_chars),
    *(
        _many(name, "texts", lambda limits: limits.max_batch)
        for name in ("documents", "items", "queries", "texts", "inputs", "text_1", "text_2", "data_1", "data_2")
    ),
    _many("chat_template_kwargs", "chat_template_kwargs", lambda limits: limits.max_template_arguments),
    *(
        _many(name, "entries", lambda limits: limits.max_entries)
        for name in ("logit_bias", "bad_words", "stop_token_ids", "metadata", "include")
    ),
    _many("allowed_token_ids", "token ids", lambda limits: limits.max_prompt_chars),
)
"""Field, what it holds many of, and how many it may: looked at before any of them is."""
_MAY_BE_IDS = frozenset({"prompt", "input", "inputs"})
