"""The giving side: keeps the pages of requests that another engine is to go on with, and sends what is asked for.

A *ticket* names such a request. While it is computed here, whoever fetches by its ticket waits for the next pages. Once it is done
its pages are under a *lease*: they are referenced, so that nobody evicts them, until they were fetched, released, or the time is
up. The lease only protects: what is sent is what the prefix index has under the asked tokens, so a page that holds something else
by now is never sent.

Pages are read by a program of the engine, in the order of its steps; the copies are the reader's, so a slow reader holds none of
the engine's pages up beyond its lease.
"""

from __future__ import annotations

import dataclasses
import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from serving.engine.api.media import Media
from serving.engine.api.peers.transfers import ALIVE, STATE, Offer, Parcel, TransferError, Wanted
from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason, TransferParams
from serving.engine.cache.kv_manager import KVManager
from serving.engine.cache.kv_windows import first_page
from serving.engine.device.stores.page_store import PARCEL, Lent
from serving.engine.device.stores.parts import packed
from serving.engine.engine import Engine
from serving.engine.requests.commands import PagesOut
from serving.engine.requests.moves import PageMove
from serving.engine.requests.request import RequestState
from serving.transfer.config import TransferConfig
from serving.transfer.device_link import DeviceLink
from serving.transfer.digests import chain, content_digest
from serving.transfer.forms import Form
from serving.transfer.ledger import Ledger

log = logging.getLogger(__name__)

LEASED_SHARE = 0.5
"""Of an engine's pages, those that may be kept for others at most. Beyond it they stay cached, and may be evicted."""
POLL_S = 0.005
"""How often to look whether the next pages are computed; asking waits for the step that runs anyway."""
ALIVE_S = 0.5
"""How often to tell a waiting peer that we live."""
ROOM_S = 2.0
"""How long to wait for others to pull what they were offered, before pages are sent instead."""
COMING_S = 5.0
"""How long to wait for a ticket's request to arrive: the peer may have been asked first."""

CALL_S = 30.0
"""How long the engine may take to answer between two steps."""
MOST_OVER = 10_000
"""Tickets that are remembered when they are over."""

Pages = list[tuple[KVManager, list[int]]]


@dataclasses.dataclass(eq=False)
class _Ticket:
    """A request that another engine is to go on with.

    Attributes:
        done: it is computed; its pages are under a lease.
        held: the pages that are referenced for it.
        state: (digest of the prefix, the recurrent state behind it): a copy, because nobody holds snapshots.
        deadline: of the lease; time.monotonic() seconds.
    """

    request: EngineRequest
    done: bool = False
    held: Pages = dataclasses.field(default_factory=list)
    state: tuple[bytes, Callable[[], list[Any]]] | None = None
    deadline: float = 0.0


class Giving:
    """Gives pages of one engine. `submitted` to `look` are called on its thread, the others on any."""

    def __init__(
        self, engine: Engine, config: TransferConfig, identity: bytes, ledger: Ledger, forms: Sequence[Form],
        link: DeviceLink | None = None,
    ) -> None:  # fmt: skip
        self.identity = identity
        self._forms = forms
        self._link = link
        self._engine = engine
        self._kv = engine.scheduler.kv
        self._config = config
        self._ledger = ledger
        self._tickets: dict[str, _Ticket] = {}
        self._by_request: dict[str, str] = {}
        self._over: OrderedDict[str, None] = OrderedDict()
        self._changed = threading.Condition()
        self._closed = False

    # ---- on the engine's thread ----

    @property
    def leases(self) -> list[_Ticket]:
        """Those whose pages are kept now."""
        return [ticket for ticket in self._tickets.values() if ticket.done]

    @property
    def leased_pages(self) -> int:
        return sum(len(pages) for ticket in self.leases for _, pages in ticket.held)

    def submitted(self, request: EngineRequest) -> None:
        """A request was taken that another engine is to go on with."""
        assert request.transfer is not None
        name = request.transfer.ticket or secrets.token_hex(16)
        if name in self._tickets:
            log.warning("request %s names a ticket that is in use; its pages are not kept", request.request_id)
            return
        self._tickets[name] = _Ticket(request)
        self._by_request[request.request_id] = name
        self._tell()

    def emitted(self, output: EngineOutput) -> EngineOutput:
        """An output on its way out; of a request that is done, what its client is to tell the other engine."""
        if output.finish_reason is None or output.request_id not in self._by_request:
            return output
        name = self._by_request.pop(output.request_id)
        ticket = self._tickets[name]
        if output.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            self._end(name)
            return output
        ticket.done, ticket.deadline = True, time.monotonic() + self._config.lease_s
        self._hold(ticket)
        self._tell()
        return dataclasses.replace(output, transfer=TransferParams(remote_prefill=True, ticket=name))

    def expire(self) -> None:
        """Gives up leases whose time is up."""
        now = time.monotonic()
        for name, ticket in list(self._tickets.items()):
            if ticket.done and ticket.deadline <= now:
                self._ledger.add(leases_expired=1)
                self._end(name)

    def give_way(self) -> bool:
        """Gives up every lease: the engine's own requests have no pages to run with. Whether there was one."""
        names = [name for name, ticket in self._tickets.items() if ticket.held]
        for name in names:
            self._end(name)
        return bool(names)

    def weights_changed(self) -> None:
        """Pages from before are no more what their tokens say."""
        self.identity = secrets.token_bytes(16)
        for name in list(self._tickets):
            self._end(name)

    def close(self) -> None:
        """Ends whoever waits here."""
        self._closed = True
        self._tell()

    def _hold(self, ticket: _Ticket) -> None:
        """References what the index has of a request that is done: it has just let go of it."""
        tokens, media = ticket.request.prompt_token_ids, ticket.request.media
        for manager in self._kv.managers:
            digests = manager.prefixes.chain(tokens[:-1], ticket.request.adapter, ticket.request.cache_salt, media)
            found = list(self._found(manager, tokens, media, digests, 0, len(digests)))
            room = int(manager.pool.num_pages * LEASED_SHARE) - self.leased_pages
            pages = [page for _, row in found for page in row]
            if pages and len(pages) <= room:
                manager.pool.share(pages)
                ticket.held.append((manager, pages))
            if manager.snapshots is not None and digests and (row := manager.snapshots.find(digests[-1])) is not None:
                ticket.state = digests[-1], self._engine.runner.executor.states.lend(manager.replica, row)
            if ticket.held or ticket.state:
                return

    def _end(self, name: str) -> None:
        """Gives up a ticket. Its name is remembered: nobody waits for its request to arrive any more."""
        self._over[name] = None
        while len(self._over) > MOST_OVER:
            self._over.popitem(last=False)
        ticket = self._tickets.pop(name, None)
        if ticket is None:
            return
        self._by_request.pop(ticket.request.request_id, None)
        for manager, pages in ticket.held:
            manager.pool.release(pages)
        self._tell()

    def _found(
        self,
        manager: KVManager,
        tokens: tuple[int, ...],
        media: Media | None,
        digests: list[bytes],
        first: int,
        count: int,
    ) -> Iterator[tuple[int, list[int]]]:
        """(page of the sequence, the pages of all groups that need it for a prefix of `count`), from `first` on, as long as
        there are any."""
        size, prefixes = manager.pool.page_size, manager.prefixes
        firsts = [first_page(window, count * size, size) for window in manager.windows]
        for i in range(first, count):
            content = prefixes.content_of(tokens[i * size : (i + 1) * size], i * size, media)
            keys = [prefixes.key(group, digests[i]) for group, start in enumerate(firsts) if start <= i]
            if not all(manager.pool.holds(key, content) for key in keys):
                return
            yield i, [manager.pool.find(key) or 0 for key in keys]

    def _digests(self, manager: KVManager, wanted: Wanted, count: int, known: dict[bytes, list[bytes]]) -> list[bytes]:
        """Of the first `count` pages that are wanted, in this manager's index. `known`: those of before, by their root."""
        root = manager.prefixes.root(wanted.adapter, wanted.salt)
        if root not in known:
            tokens = wanted.token_ids[: count * manager.pool.page_size]
            known[root] = manager.prefixes.chain(tokens, wanted.adapter, wanted.salt, wanted.media)
        return known[root]

    def _read(
        self, wanted: Wanted, first: int, count: int, known: dict[bytes, list[bytes]]
    ) -> tuple[list[int], list[int], Lent] | None:
        """Starts to copy the next pages out: (which, how many groups each has, the copies); None where there are none."""
        if self.identity != wanted.identity:
            return None
        for manager in self._kv.managers:
            digests = self._digests(manager, wanted, count, known)
            moves: list[PageMove] = []
            which: list[int] = []
            groups: list[int] = []
            for i, pages in self._found(manager, wanted.token_ids, wanted.media, digests, first, count):
                if moves and len(moves) + len(pages) > PARCEL:
                    break
                moves += [PageMove(manager.replica, page, b"%d:%d" % (i, g)) for g, page in enumerate(pages)]
                which.append(i)
                groups.append(len(pages))
            if moves:
                manager.pool.touch(digests[first])
                return which, groups, self._engine.runner.executor.lend_pages(PagesOut.of(moves))
        return None

    def _read_state(
        self, wanted: Wanted, count: int, known: dict[bytes, list[bytes]]
    ) -> Callable[[], list[Any]] | None:
        ticket = self._tickets.get(wanted.ticket)
        for manager in self._kv.managers:
            if manager.snapshots is None or self.identity != wanted.identity:
                continue
            digest = self._digests(manager, wanted, count, known)[-1]
            if ticket is not None and ticket.state is not None and ticket.state[0] == digest:
                return ticket.state[1]
            row = manager.snapshots.find(digest)
            if row is not None:
                return self._engine.runner.executor.states.lend(manager.replica, row)
        return None

    def _more_to_come(self, name: str) -> bool | None:
        """Whether a ticket's request is still computed here; None where no such ticket is known, but may be yet."""
        ticket = self._tickets.get(name)
        if ticket is None:
            return False if name in self._over else None
        request = self._engine.scheduler.requests.get(ticket.request.request_id)
        return not ticket.done and request is not None and request.state is not RequestState.FINISHED

    # ---- on any thread ----

    def release(self, ticket: str) -> bool:
        """See PageSource.release."""
        return self._call(lambda: (ticket in self._tickets, self._end(ticket))[0])

    def pulled(self, number: int) -> None:
        """See PageSource.pulled."""
        if self._link is not None:
            self._link.pulled(number)

    def fetch(self, wanted: Wanted) -> Iterator[Parcel]:
        """See PageSource.fetch."""
        if wanted.identity != self.identity:
            raise TransferError(
                "other_model",
                "The engines differ in model, weights, dtypes or page size: their pages mean different things.",
            )
        began = time.monotonic()
        self._ledger.add(requests_out=1)
        sent = offered = 0
        try:
            for parcel in self._parcels(wanted, began):
                if parcel.offer is not None and self._link is not None:
                    offered += self._link.row_bytes * parcel.offer.rows
                sent += len(parcel.content)
                yield parcel
        finally:
            seconds = time.monotonic() - began
            self._ledger.add(bytes_out=sent + offered, device_bytes_out=offered, seconds_out=seconds)
            if wanted.ticket and not self._closed:
                self.release(wanted.ticket)

    def _parcels(self, wanted: Wanted, began: float) -> Generator[Parcel, None, None]:
        size = self._kv.managers[0].pool.page_size
        count = min(wanted.tokens, len(wanted.token_ids)) // size
        at = wanted.first // size if self._kv.managers[0].windows else count
        known: dict[bytes, list[bytes]] = {}
        tokens = wanted.token_ids[: count * size]
        links = chain(wanted.identity, tokens, size, wanted.adapter, wanted.salt, wanted.media)
        told, coming = began, began + min(COMING_S, wanted.timeout_s)
        while at < count:
            found, more = yield from self._ask(
                lambda at=at: (self._read(wanted, at, count, known), self._more_to_come(wanted.ticket))
            )
            if found is not None:
                which, groups, lent = found
                offer = yield from self._offered(wanted, lent, sum(groups))
                for parcel in self._packed(which, groups, lent, links, offer):
                    at = parcel.page + 1
                    yield parcel
                told = time.monotonic()
                continue
            now = time.monotonic()
            may_come = wanted.ticket and (more or (more is None and now < coming and at == wanted.first // size))
            if self._closed or not may_come or now > began + wanted.timeout_s:
                return
            if now - told > ALIVE_S:
                told = now
                yield Parcel(ALIVE)
            with self._changed:
                self._changed.wait(POLL_S if more else 0.05)
        if count and self._kv.managers[0].snapshots is not None:
            yield from self._state(wanted, links[-1], count, known, began)

    def _state(
        self, wanted: Wanted, link: bytes, count: int, known: dict[bytes, list[bytes]], began: float
    ) -> Generator[Parcel, None, None]:
        """The recurrent state behind all of it, once it is there."""
        while True:
            taken, more = yield from self._ask(
                lambda: (self._read_state(wanted, count, known), self._more_to_come(wanted.ticket))
            )
            if taken is not None:
                content = packed(taken())
                yield Parcel(STATE, content, content_digest(link, STATE, content))
                return
            late = time.monotonic() > began + (wanted.timeout_s if more else COMING_S)
            if more is False or not wanted.ticket or self._closed or late:
                return
            with self._changed:
                self._changed.wait(POLL_S)

    def _offered(self, wanted: Wanted, lent: Lent, rows: int) -> Generator[Parcel, None, Offer | None]:
        """Offers copies to whoever can pull them from their device; None where they are sent instead. An array has as many rows as
        a parcel, however many pages there are: fewer than half are sent."""
        link = self._link
        if link is None or wanted.device is None or wanted.device != link.way or 2 * rows < PARCEL:
            return None
        arrays = lent.on_device
        if arrays is None or any(form.heads is not None for form in self._forms):
            return None
        end = time.monotonic() + ROOM_S
        while not link.has_room(ALIVE_S):
            if time.monotonic() > end or self._closed:
                return None
            yield Parcel(ALIVE)
        return link.offer(arrays)

    def _packed(
        self, which: list[int], groups: list[int], lent: Lent, links: list[bytes], offer: Offer | None
    ) -> Iterable[Parcel]:
        pages, row = iter(lent), 0
        for i, count in zip(which, groups, strict=True):
            content = b"".join(self._row(next(pages)) for _ in range(count))
            digest = content_digest(links[i], i, content)
            if offer is None:
                yield Parcel(i, content, digest)
            else:
                yield Parcel(i, b"", digest, dataclasses.replace(offer, first=row, rows=count))
            row += count

    def _row(self, rows: list[Any]) -> bytes:
        """A page of one group as it travels."""
        return packed([form.out(row) for form, row in zip(self._forms, rows, strict=True)])

    def _ask(self, function: Callable[[], Any]) -> Generator[Parcel, None, Any]:
        """What the engine's thread says, and signs of life while it is in a step: one may take longer than a peer is patient."""
        asked, end = self._engine.loop.ask(function), time.monotonic() + CALL_S
        while True:
            try:
                return asked.result(ALIVE_S)
            except TimeoutError:
                if asked.done() or not self._engine.loop.answers or time.monotonic() > end:
                    raise
            yield Parcel(ALIVE)

    def _call(self, function: Callable[[], Any]) -> Any:
        return self._engine.call(function, CALL_S)

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()
