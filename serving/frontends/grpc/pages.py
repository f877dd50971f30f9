"""Page events on the wire: Control.WatchPages, both of its ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np

from proto.jaxserve.v1 import control_pb2 as pb
from serving.engine.api.page_events import (
    PageBatch,
    PageEvent,
    PageEvents,
    PagesCleared,
    PagesRemoved,
    PagesStored,
)
from serving.errors import ErrorKind, RequestError

MAX_EVENTS = 2_000
"""In one message: those of a whole state are many."""
MAX_BEHIND = 20_000
"""Batches that a reader may be behind; then it has to begin anew."""


async def follow(events: PageEvents, request: pb.WatchPagesRequest) -> AsyncIterator[pb.WatchPagesResponse]:
    """The messages of one call, until it is dropped.

    Raises:
        RequestError: RESOURCE_EXHAUSTED, where the caller reads too slowly.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[PageBatch] = asyncio.Queue()

    def take(batch: PageBatch) -> None:  # on the log's thread
        loop.call_soon_threadsafe(queue.put_nowait, batch)

    known = request.log_id == events.log_id and request.HasField("after")
    await asyncio.to_thread(events.follow, take, request.after if known else None)
    try:
        while True:
            if queue.qsize() > MAX_BEHIND:
                raise RequestError(
                    ErrorKind.RESOURCE_EXHAUSTED, "The page events were not read fast enough. Ask again."
                )
            for message in messages_of(await queue.get(), events.log_id):
                yield message
    finally:
        events.leave(take)


def messages_of(batch: PageBatch, log_id: str) -> list[pb.WatchPagesResponse]:
    """One batch, in as many messages as it takes."""
    pieces = [batch.events[i : i + MAX_EVENTS] for i in range(0, len(batch.events), MAX_EVENTS)]
    return [
        pb.WatchPagesResponse(
            log_id=log_id,
            sequence=batch.sequence if batch.sequence >= 0 else None,
            time=batch.time,
            events=[_to_wire(event) for event in piece],
        )
        for piece in pieces
    ]


def events_of(message: pb.WatchPagesResponse) -> list[PageEvent]:
    """What a message tells."""
    return [event for event in map(_from_wire, message.events) if event is not None]


def _to_wire(event: PageEvent) -> pb.PageEvent:
    if isinstance(event, PagesStored):
        stored = pb.PagesStored(
            hashes=event.hashes,
            parent=event.parent or b"",
            token_ids=np.frombuffer(event.tokens, "<u4").tolist(),  # an image's marks are negative
            page_size=event.page_size,
            adapter=event.adapter or "",
            cache_salt=event.salt or "",
            group=event.group,
            window=event.window,
        )
        return pb.PageEvent(stored=stored, replica=event.replica)
    if isinstance(event, PagesRemoved):
        removed = pb.PagesRemoved(hashes=event.hashes, group=event.group)
        return pb.PageEvent(removed=removed, replica=event.replica)
    return pb.PageEvent(cleared=pb.PagesCleared(), replica=event.replica)


def _from_wire(event: pb.PageEvent) -> PageEvent | None:
    which = event.WhichOneof("event")
    if which == "stored":
        one = event.stored
        return PagesStored(
            tuple(one.hashes),
            one.parent or None,
            np.array(one.token_ids, "<u4").tobytes(),
            one.page_size,
            one.adapter or None,
            one.cache_salt or None,
            one.group,
            one.window if one.HasField("window") else None,
            event.replica,
        )
    if which == "removed":
        return PagesRemoved(tuple(event.removed.hashes), event.removed.group, event.replica)
    return PagesCleared(event.replica) if which == "cleared" else None
