"""A way for pages between engines of one process, on which anything can be made to go wrong."""

from __future__ import annotations

import dataclasses
import threading
import time

from serving.engine.api.peers.transfers import TransferError
from serving.engine.engine import Engine


class LocalTransport:
    """`Transport` to engines by name.

    Attributes:
        engines: "name:1" -> who gives pages there; whoever is not there cannot be reached.
        before: called with each parcel before it arrives, and with None before the first; may sleep, raise, or give another.
        released: tickets that nobody will fetch.
        outside: the way to all other addresses, where there is one.
    """

    def __init__(self) -> None:
        self.engines: dict[str, Engine] = {}
        self.before = lambda parcel: parcel
        self.released: list[str] = []
        self.fetches = 0
        self.outside = None

    def fetch(self, address, wanted):
        self.fetches += 1
        if self.outside is not None and address != "prefill:1":
            return self.outside.fetch(address, wanted)
        return _Fetching(self, address, wanted)

    def release(self, address, ticket):
        self.released.append(ticket)
        if self.outside is not None and address != "prefill:1":
            return self.outside.release(address, ticket)
        if address in self.engines:
            self.engines[address].page_source.release(ticket)

    def pulled(self, address, number):
        if self.outside is not None and address != "prefill:1":
            return self.outside.pulled(address, number)
        if address in self.engines:
            self.engines[address].page_source.pulled(number)

    def close(self):
        pass


class _Fetching:
    def __init__(self, transport, address, wanted):
        self._transport, self._address, self._wanted = transport, address, wanted
        self._cancelled = threading.Event()

    def cancel(self):
        self._cancelled.set()

    def __iter__(self):
        transport = self._transport
        transport.before(None)
        engine = transport.engines.get(self._address)
        if engine is None:
            raise TransferError("unreachable")
        parcels = engine.page_source.fetch(self._wanted)
        try:
            for parcel in parcels:
                parcel = transport.before(parcel)
                if self._cancelled.is_set():
                    raise TransferError("aborted")
                if transport.engines.get(self._address) is not engine:
                    raise TransferError("unreachable")
                if parcel is not None:
                    yield parcel
        finally:
            parcels.close()


def slow(seconds):
    """A link that takes so long for each parcel."""

    def before(parcel):
        time.sleep(seconds)
        return parcel

    return before


def cut_at(page, error="unreachable"):
    """A link that breaks when this page comes."""

    def before(parcel):
        if parcel is not None and parcel.page == page:
            raise TransferError(error)
        return parcel

    return before


def spoilt(page):
    """A link that changes a bit of this page."""

    def before(parcel):
        if parcel is None or parcel.page != page:
            return parcel
        return dataclasses.replace(parcel, content=bytes([parcel.content[0] ^ 1]) + parcel.content[1:])

    return before
