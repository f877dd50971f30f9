"""What an engine has cached, by what it tells: follows its page events, and has the router go by them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import numpy as np

from proto.jaxserve.v1 import control_pb2 as pb
from serving.engine.api.page_events import PageEvent, PagesCleared, PagesRemoved
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc.pages import events_of
from serving.routing.prefixes import ToldPrefixes
from serving.routing.router import Router

log = logging.getLogger("serving.gateway")

AGAIN_S = 1.0
NEVER = frozenset({ErrorKind.UNIMPLEMENTED, ErrorKind.PERMISSION_DENIED, ErrorKind.UNAUTHENTICATED})
"""Answers that asking again does not change: then the router goes by what it has sent."""


class Watched(Protocol):
    """What is needed of a remote engine."""

    def page_batches(self, log_id: str, after: int | None) -> AsyncGenerator[pb.WatchPagesResponse, None]: ...


class Pages:
    """The pages of one engine, of one group of layers: those that see everything, or, where there are none, the first.

    Layers that look back a window only keep but the end of a prefix, which says nothing of what lies before it.
    """

    def __init__(self) -> None:
        self.prefixes: ToldPrefixes | None = None
        self._group: int | None = None
        self._whole = False

    def apply(self, events: list[PageEvent]) -> None:
        """Takes in what the engine tells."""
        for event in events:
            if isinstance(event, PagesCleared):
                if self.prefixes is not None:
                    self.prefixes.clear(event.replica)
            elif isinstance(event, PagesRemoved):
                if self.prefixes is not None and event.group == self._group:
                    self.prefixes.removed((event.replica, one) for one in event.hashes)
            else:
                whole = event.window is None
                if (
                    self.prefixes is None
                    or (whole and not self._whole)
                    or self.prefixes.block_tokens != event.page_size
                ):
                    self.prefixes = ToldPrefixes(event.page_size)
                    self._group, self._whole = event.group, whole
                if event.group == self._group:
                    tokens = np.frombuffer(event.tokens, "<i4").tolist()
                    self.prefixes.stored(
                        [(event.replica, one) for one in event.hashes],
                        None if event.parent is None else (event.replica, event.parent),
                        tokens,
                        (event.adapter, event.salt),
                    )


async def follow(name: str, client: Watched, router: Router) -> None:
    """Follows one engine until it is cancelled, or says that it tells nothing."""
    pages, log_id, after = Pages(), "", None
    using: Any = None
    while True:
        try:
            async for message in client.page_batches(log_id, after):
                if message.log_id != log_id:
                    log_id, pages, after = message.log_id, Pages(), None
                pages.apply(events_of(message))
                after = message.sequence if message.HasField("sequence") else after
                if pages.prefixes is not None and pages.prefixes is not using:
                    if using is None:
                        log.info("the engine at %s tells what it has cached", name)
                    using = pages.prefixes
                    router.use(name, using)
        except RequestError as error:
            if error.kind in NEVER:
                log.info("the engine at %s does not tell what it has cached: %s", name, error.message)
                return
        await asyncio.sleep(AGAIN_S)
