"""The giving side of page transfers as a gRPC service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from google.protobuf.descriptor import ServiceDescriptor

from proto.jaxserve.v1 import transfer_pb2 as pb
from serving.access import Access, caller_of_task
from serving.engine.api.media import Media, outline_of
from serving.engine.api.peers.transfers import DeviceWay, Offer, PageSource, TransferError, Wanted
from serving.errors import ErrorKind, RequestError, invalid
from serving.service import TextService

TRANSFER: ServiceDescriptor = pb.DESCRIPTOR.services_by_name["Transfer"]


MAX_POSITIONS = 2**22
"""Of a sequence with images: more than any context has."""


def media_from(request: pb.FetchRequest) -> Media | None:
    """What stands in the places of images.

    Raises:
        RequestError: INVALID_ARGUMENT for positions that no sequence has, or out of order.
    """
    if not request.media:
        return None
    items, behind = [], 0
    for i, one in enumerate(request.media):
        places = []
        for first, count in zip(one.runs[::2], one.runs[1::2], strict=False):
            if first < behind or not 0 < count <= MAX_POSITIONS - first:
                raise invalid(f"media[{i}].runs: positions must ascend and be below {MAX_POSITIONS}.", "media")
            places.append(np.arange(first, first + count, dtype=np.int32))
            behind = first + count
        if not places or len(one.runs) % 2 or len(one.digest) != 32:
            raise invalid(f"media[{i}] must have a digest of 32 bytes and pairs of a position and a number.", "media")
        items.append((one.digest, np.concatenate(places)))
    return outline_of(items, max(behind, len(request.token_ids)))


def _offer_to(offer: Offer) -> pb.Offer:
    return pb.Offer(address=offer.address, number=offer.number, first=offer.first, rows=offer.rows)


class Transfer:
    """Fetch and Release.

    Args:
        service: gives the service, or raises UNAVAILABLE while there is none yet.
        access: who may.
    """

    descriptor = TRANSFER

    def __init__(self, service: Callable[[], TextService], access: Access) -> None:
        self._service = service
        self._access = access

    async def Fetch(  # noqa: N802 - named as in the .proto
        self, request: pb.FetchRequest, context: Any
    ) -> AsyncIterator[pb.FetchResponse]:
        wanted = Wanted(
            request.identity,
            tuple(request.token_ids),
            request.first,
            request.tokens,
            request.adapter or None,
            request.cache_salt if request.HasField("cache_salt") else None,
            request.ticket,
            request.timeout_s,
            media_from(request),
            DeviceWay(request.device.platform, request.device.version) if request.HasField("device") else None,
        )
        parcels = iter(self._source().fetch(wanted))
        loop = asyncio.get_running_loop()
        thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-give")  # its own: pages are waited for
        try:
            while (parcel := await loop.run_in_executor(thread, next, parcels, None)) is not None:
                offer = None if parcel.offer is None else _offer_to(parcel.offer)
                yield pb.FetchResponse(page=parcel.page, content=parcel.content, digest=parcel.digest, offer=offer)
        except TransferError as error:
            raise RequestError(ErrorKind.FAILED_PRECONDITION, str(error)) from error
        finally:
            thread.submit(parcels.close)  # type: ignore[attr-defined] - a generator; behind what it may still be doing
            thread.shutdown(wait=False)

    async def Release(  # noqa: N802
        self, request: pb.ReleaseRequest, context: Any
    ) -> pb.ReleaseResponse:
        source = self._source()
        for number in request.pulled:
            source.pulled(number)
        if not request.ticket:
            return pb.ReleaseResponse()
        return pb.ReleaseResponse(found=await asyncio.to_thread(source.release, request.ticket))

    def _source(self) -> PageSource:
        self._access.check_watch(caller_of_task.get())
        source = self._service().client.page_source
        if source is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED, "This server gives no pages to others: start it with --role prefill or both."
            )
        return source
