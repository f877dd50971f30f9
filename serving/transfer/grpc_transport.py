"""Pages over a stream of gRPC: what works between any two hosts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np

from proto.jaxserve.v1 import transfer_pb2 as pb
from proto.jaxserve.v1 import transfer_pb2_grpc
from serving.access import ClientTls
from serving.engine.api.media import Media
from serving.engine.api.peers.transfers import DeviceWay, Offer, Parcel, TransferError, Wanted

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A peer that was started anew is found again at once.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)
RELEASE_S = 5.0
GRACE_S = 5.0
"""What a call may take beyond what its server was told to wait."""

_REASONS = {
    grpc.StatusCode.UNAVAILABLE: "unreachable",
    grpc.StatusCode.FAILED_PRECONDITION: "other_model",
    grpc.StatusCode.CANCELLED: "aborted",
    grpc.StatusCode.DEADLINE_EXCEEDED: "too_slow",
}


def places_of(media: Media) -> Iterator[pb.MediaPlaces]:
    """A sequence's images, those behind what is wanted too: an image may begin before and end there."""
    for item in media.items:
        begins = np.flatnonzero(np.diff(item.places_N, prepend=-2) != 1)
        counts = np.diff(np.append(begins, item.size))
        yield pb.MediaPlaces(digest=item.digest, runs=np.stack([item.places_N[begins], counts], 1).ravel().tolist())


def _way_to(way: DeviceWay) -> pb.DeviceWay:
    return pb.DeviceWay(platform=way.platform, version=way.version)


def _offer_from(wire: pb.Offer) -> Offer:
    return Offer(wire.address, wire.number, wire.first, wire.rows)


class GrpcTransport:
    """See `Transport`.

    Args:
        api_key: sent with every call; of role proxy at the peers.
        tls: how to reach peers that have TLS.
    """

    def __init__(self, api_key: str | None = None, tls: ClientTls | None = None) -> None:
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._tls = tls
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def fetch(self, address: str, wanted: Wanted) -> GrpcFetching:
        """See Transport."""
        request = pb.FetchRequest(
            identity=wanted.identity,
            token_ids=wanted.token_ids[: wanted.tokens],
            first=wanted.first,
            tokens=wanted.tokens,
            adapter=wanted.adapter or "",
            cache_salt=wanted.salt,
            ticket=wanted.ticket,
            timeout_s=wanted.timeout_s,
            media=() if wanted.media is None else list(places_of(wanted.media)),
            device=None if wanted.device is None else _way_to(wanted.device),
        )
        call = self._stub(address).Fetch(request, timeout=wanted.timeout_s + GRACE_S, metadata=self._metadata)
        return GrpcFetching(call)

    def release(self, address: str, ticket: str) -> None:
        """See Transport."""
        if ticket:
            request = pb.ReleaseRequest(ticket=ticket)
            self._stub(address).Release.future(request, timeout=RELEASE_S, metadata=self._metadata)

    def pulled(self, address: str, number: int) -> None:
        """See Transport."""
        request = pb.ReleaseRequest(pulled=[number])
        self._stub(address).Release.future(request, timeout=RELEASE_S, metadata=self._metadata)

    def close(self) -> None:
        """Ends every connection, and what comes over it."""
        with self._lock:
            channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            channel.close()

    def _stub(self, address: str) -> Any:
        with self._lock:
            channel = self._channels.get(address)
            if channel is None:
                if self._tls is None:
                    channel = grpc.insecure_channel(address, options=OPTIONS)
                else:
                    credentials = grpc.ssl_channel_credentials(**self._tls.grpc_arguments())
                    channel = grpc.secure_channel(address, credentials, options=OPTIONS)
                self._channels[address] = channel
        return transfer_pb2_grpc.TransferStub(channel)


class GrpcFetching:
    """See `Fetching`."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __iter__(self) -> Iterator[Parcel]:
        try:
            for message in self._call:
                offer = _offer_from(message.offer) if message.HasField("offer") else None
                yield Parcel(message.page, message.content, message.digest, offer)
        except grpc.RpcError as error:
            code: Any = error.code()  # type: ignore[attr-defined] - of a call
            raise TransferError(_REASONS.get(code, "failed"), error.details()) from error  # type: ignore[attr-defined]

    def cancel(self) -> None:
        """Ends it; what iterates over it is told so."""
        self._call.cancel()
