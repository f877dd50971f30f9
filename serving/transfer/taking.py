"""The taking side: fetches the pages of requests that another engine computed, while they wait as RECEIVING.

A thread reads what comes and verifies it; the engine's thread writes it, between two steps, to the pages that were set aside.
Whatever happens to a transfer, its request goes on with what was verified by then, and computes the rest.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from serving.engine.api.peers.transfers import ALIVE, STATE, Fetching, Parcel, TransferError, Transport, Wanted
from serving.engine.api.types import EngineRequest
from serving.engine.device.stores.page_store import PARCEL
from serving.engine.device.stores.parts import unpacked
from serving.engine.engine import Engine
from serving.engine.requests.commands import PagesIn, PagesOut
from serving.engine.requests.moves import Landing, PageMove
from serving.engine.requests.request import RequestState
from serving.transfer.config import TransferConfig
from serving.transfer.device_link import DeviceLink, Pulling
from serving.transfer.digests import chain, content_digest
from serving.transfer.disk import DiskFetching, DiskTier
from serving.transfer.forms import Form, forms_of, row_of
from serving.transfer.ledger import Ledger

log = logging.getLogger(__name__)

LEAST_PAGES = 4
"""Fewer pages are not worth the wait for a thread."""
MEASURED_TOKENS, DOUBT = 1_000, 0.9
"""After so many it is believed what they took; and what is left of that each time that it kept somebody from fetching: what was
slow once is tried again."""
WRITE_S = 0.05
"""How long verified pages wait for others to be written with."""

CALL_S = 30.0
"""How long the engine may take to answer between two steps."""


@dataclasses.dataclass(eq=False)
class _Job:
    """A transfer to this engine.

    Attributes:
        followers: ids of requests that wait for the same pages.
        heard: when something last came; time.monotonic() seconds. 0.0 before it was begun.
        ours: what came waits to be written here: it is not the peer that is silent.
        why: the reason for which it was ended from outside.
        begin: opens it; None: the transport does.
    """

    request: EngineRequest
    address: str
    wanted: Wanted
    landing: Landing
    deadline: float
    followers: list[str] = dataclasses.field(default_factory=list)
    heard: float = 0.0
    ours: bool = False
    fetching: Fetching | None = None
    why: str = ""
    begin: Callable[[], Fetching] | None = None

    def end(self, why: str) -> None:
        """Ends it from another thread: what was verified by then counts."""
        self.why = self.why or why
        if self.fetching is not None:
            self.fetching.cancel()


def _seen(request: EngineRequest) -> bytes:
    """What tells its images from others in the same tokens."""
    return b"" if request.media is None else request.media.identity


@dataclasses.dataclass
class _Came:
    """What of a transfer is written.

    Attributes:
        tokens: from the sequence's beginning, whole pages.
        state: the recurrent state behind all that was asked for is there, or none is needed.
        bytes: that came, verified or not.
        device_bytes: of them, from the peer's device.
    """

    tokens: int
    state: bool
    bytes: int = 0
    device_bytes: int = 0


class Taking:
    """Takes pages into one engine. Its thread calls everything but `close`."""

    def __init__(
        self, engine: Engine, config: TransferConfig, identity: bytes, transport: Transport | None, ledger: Ledger,
        forms: Sequence[Form] | None = None, link: DeviceLink | None = None,
    ) -> None:  # fmt: skip
        self.identity = identity
        self._forms = forms or forms_of(engine.runner.executor.page_arrays, None, None)  # how pages come
        self._link = link
        self._engine = engine
        self._config = config
        self._transport = transport
        self._ledger = ledger
        self._jobs: dict[str, _Job] = {}
        self._waiting: deque[tuple[EngineRequest, float]] = deque()  # for room, each until so long
        self._fetched = 0.0, 0.0  # tokens and seconds, of pages that were there and not computed meanwhile
        self._threads = ThreadPoolExecutor(config.max_parallel, thread_name_prefix="jaxserve-transfer")
        self._closed = threading.Event()
        self._turn = threading.Lock()

    @property
    def receiving(self) -> int:
        return self._engine.scheduler.receiving.count

    def submitted(self, request: EngineRequest) -> None:
        """A request was taken whose prompt another engine computes."""
        told, scheduler, transport = request.transfer, self._engine.scheduler, self._transport
        assert told is not None and transport is not None
        if not self._config.allows(told.host, told.port):
            log.warning("pages are not fetched from %s: it is none of the peers of --kv-transfer-config", told.address)
            return self._ledger.fell_back("not_allowed")
        tokens = len(request.prompt_token_ids) - 1
        for job in self._jobs.values():
            if self._same(job, request):
                if scheduler.hold(request.request_id):
                    job.followers.append(request.request_id)
                return None
        if not told.ticket and not self._cheaper():
            return self._ledger.fell_back("not_needed")
        if not self._begin(request):
            why = self._why_not(request, tokens)
            others = scheduler.running or self._jobs  # whose pages come free
            if why == "no_room" and others and scheduler.hold(request.request_id):
                self._waiting.append((request, time.monotonic() + self._config.timeout_s))
                return None
            self._ledger.fell_back(why)
            self._threads.submit(transport.release, told.address, told.ticket)
        return None

    def _begin(self, request: EngineRequest) -> bool:
        """Begins a transfer for a request that waits, if there is room for what is to come."""
        told = request.transfer
        assert told is not None
        landing = self._room(request, len(request.prompt_token_ids) - 1)
        if landing is None:
            return False
        now = time.monotonic()
        deadline = now + self._config.timeout_s
        if request.deadline is not None:
            deadline = min(deadline, request.deadline)
        wanted = Wanted(
            self.identity, request.prompt_token_ids, landing.first, landing.tokens, request.adapter, request.cache_salt,
            told.ticket, max(0.1, deadline - now), request.media and request.media.outline(),
            None if self._link is None else self._link.way_to(told.address),
        )  # fmt: skip
        self._start(_Job(request, told.address, wanted, landing, deadline))
        return True

    def _room(self, request: EngineRequest, tokens: int) -> Landing | None:
        """Pages to receive into. What they held goes to host memory first, where that keeps evicted pages: they are written before
        the next step, which would do it."""
        scheduler = self._engine.scheduler
        landing = scheduler.receive(request.request_id, tokens)
        if landing is not None and (spilled := scheduler.kv.take_spilled()):
            self._engine.runner.executor.execute(PagesOut.of(spilled))
        return landing

    def _look_for_room(self) -> None:
        """Begins transfers of requests that found none when they came, in their order. Those that could never have it, or have
        waited for too long, compute their prompts here."""
        scheduler = self._engine.scheduler
        while self._waiting:
            request, deadline = self._waiting[0]
            found = scheduler.requests.get(request.request_id)
            if found is None or found.spec is not request or found.state is not RequestState.RECEIVING:
                self._waiting.popleft()
                continue
            tokens = len(request.prompt_token_ids) - 1
            late, others = time.monotonic() > deadline, bool(scheduler.running or self._jobs)
            needed = tokens // scheduler.config.page_size * len(scheduler.config.windows)
            if not late and others and needed > scheduler.pool.num_free:
                return
            scheduler.arrived(request.request_id, 0)
            if not late and not self._begin(request):
                # Where others run, their pages are still to come free.
                if others and self._why_not(request, tokens) == "no_room" and scheduler.hold(request.request_id):
                    return
                late = True
            if late:
                self._ledger.fell_back("no_room")
            self._waiting.popleft()
            if (job := self._jobs.get(request.request_id)) is not None:
                mine = [one for one in self._waiting if self._same(job, one[0])]
                job.followers += [one.request_id for one, _ in mine]
                for one in mine:
                    self._waiting.remove(one)

    def _start(self, job: _Job) -> None:
        self._jobs[job.request.request_id] = job
        self._threads.submit(self._run, job)

    def from_disk(self, request: EngineRequest, disk: DiskTier) -> None:
        """A request was taken: what of its prefix is neither on the device nor in host memory, but in files, is read first, where
        that is cheaper than computing it."""
        scheduler, executor = self._engine.scheduler, self._engine.runner.executor
        (manager,) = scheduler.kv.managers
        waiting, size = scheduler.requests.get(request.request_id), manager.pool.page_size
        if not len(disk) or waiting is None:
            return
        digests = manager.prefixes.reusable(waiting)
        known = manager.prefixes.find(waiting, digests)
        count, in_files = manager.prefixes.reach(digests, known, disk.__contains__)
        if count - known < LEAST_PAGES or not in_files or not self._cheaper():
            return
        landing = self._room(request, count * size)
        if landing is None:
            return
        pages: list[tuple[int, list[bytes]]] = []
        host = {}
        for i in range(landing.first // size, landing.tokens // size):
            keys = [manager.prefixes.key(g, digests[i]) for g, row in enumerate(landing.pages) if row[i]]
            pages.append((i, keys))
            host.update(
                {key: found for key in keys if (found := executor.store.find(landing.replica, key)) is not None}
            )
        shapes = [a.shape[1:] for a in executor.page_arrays]
        wanted = Wanted(
            self.identity, request.prompt_token_ids, landing.first, landing.tokens, request.adapter, request.cache_salt,
            media=request.media and request.media.outline(),
        )  # fmt: skip
        job = _Job(request, "the disk", wanted, landing, time.monotonic() + self._config.timeout_s)
        job.begin = lambda: DiskFetching(disk, pages, host, shapes)
        self._start(job)

    def _cheaper(self) -> bool:
        """Whether pages that are there already are sooner fetched than computed, as far as is known."""
        compute_token_s, (tokens, seconds) = (
            self._engine.scheduler.kv.managers[0].prefixes.compute_token_s,
            self._fetched,
        )
        if not compute_token_s or tokens < MEASURED_TOKENS or seconds < tokens * compute_token_s:
            return True
        self._fetched = DOUBT * tokens, DOUBT * seconds
        return False

    def ended(self, request_id: str) -> None:
        """A request is over, whatever came of its transfer."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.end("aborted")

    def expire(self) -> None:
        """Ends transfers of which nothing comes any more; begins those for which there is room now."""
        self._look_for_room()
        now = time.monotonic()
        for job in list(self._jobs.values()):
            silent = job.heard and not job.ours and now - job.heard > self._config.stall_s
            if now > job.deadline or silent:
                job.end("too_slow")
                if not job.heard:  # no thread has come to it
                    self._arrive(job, 0)

    def weights_changed(self, identity: bytes) -> None:
        """What is on its way is no more what this engine would compute."""
        self.identity = identity
        for job in list(self._jobs.values()):
            job.end("aborted")
            self._arrive(job, 0, clear=True)
        for request, _ in self._waiting:
            if (found := self._engine.scheduler.requests.get(request.request_id)) is not None:
                found.digests.clear()

    def close(self) -> None:
        """Ends every transfer."""
        self._closed.set()
        for job in list(self._jobs.values()):
            job.end("aborted")
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        return bool(self._jobs or self._waiting)

    @staticmethod
    def _same(job: _Job, request: EngineRequest) -> bool:
        """Whether a transfer brings what this request needs, too."""
        one, told = job.request, request.transfer
        return (
            not job.why and told is not None and (job.address, job.wanted.ticket) == (told.address, told.ticket)
            and (one.adapter, one.cache_salt) == (request.adapter, request.cache_salt)
            and one.prompt_token_ids == request.prompt_token_ids and _seen(one) == _seen(request)
        )  # fmt: skip

    def _why_not(self, request: EngineRequest, tokens: int) -> str:
        scheduler = self._engine.scheduler
        found = scheduler.requests.get(request.request_id)
        size = scheduler.config.page_size
        every_position = bool(request.pooling) or request.params.prompt_logprobs is not None
        lasting = request.media is not None and request.media.lasting
        if found is None or every_position or lasting or tokens < size:
            return "not_needed"
        return "not_needed" if scheduler.kv.cached_pages(found) >= tokens // size else "no_room"

    # ---- on a thread of the transfer ----

    def _run(self, job: _Job) -> None:
        began, reason = time.monotonic(), "failed"
        came = _Came(job.landing.first, not self._has_states or job.landing.row is None)
        try:
            self._receive(job, came)
            reason = job.why or ("" if came.tokens >= job.landing.tokens and came.state else "incomplete")
        except TransferError as error:
            reason = job.why or error.reason
            log.log(
                logging.DEBUG if job.why else logging.WARNING,
                "pages of request %s did not come from %s (%s); they are computed here", job.request.request_id, job.address, error,
            )  # fmt: skip
        except TimeoutError:
            reason = "too_slow"
        except Exception:
            log.exception("the transfer for request %s failed; its pages are computed here", job.request.request_id)
        # A snapshot is found with the last page: without the state that page must not be.
        tokens = came.tokens if came.state else min(came.tokens, job.landing.tokens - 1)
        taken, seconds = max(0, tokens - job.landing.first), time.monotonic() - began
        self._ledger.add(
            requests_in=1, bytes_in=came.bytes, device_bytes_in=came.device_bytes, tokens_in=taken, seconds_in=seconds
        )
        if taken and not job.wanted.ticket:
            self._fetched = self._fetched[0] + taken, self._fetched[1] + seconds
        if reason:
            self._ledger.fell_back(reason)
        if not self._closed.is_set() and self._engine.failure is None:
            self._call(lambda: self._arrive(job, tokens))

    def _receive(self, job: _Job, came: _Came) -> None:
        """Reads, verifies and writes, until all has come."""
        wanted, landing = job.wanted, job.landing
        if job.why or time.monotonic() > job.deadline:
            raise TransferError(job.why or "too_slow")
        page_size = self._engine.scheduler.config.page_size
        count, at = landing.tokens // page_size, landing.first // page_size
        tokens = wanted.token_ids[: landing.tokens]
        links = chain(wanted.identity, tokens, page_size, wanted.adapter, wanted.salt, wanted.media)
        waiting: list[Parcel] = []
        since = 0.0
        if not landing.pages:  # layers keep states alone
            at, came.tokens = count, landing.tokens
        job.heard = time.monotonic()
        begin = job.begin
        if begin is None:
            assert self._transport is not None, "what comes from files says itself how it begins"
            transport = self._transport
            begin = lambda: transport.fetch(job.address, wanted)  # noqa: E731
        job.fetching = begin()
        verified = getattr(job.fetching, "verified", False)
        pulling = self._pulling(job)
        if job.why:
            job.fetching.cancel()

        def write() -> None:
            if waiting and not self._write_in_turn(job, lambda: self._write(job, waiting)):
                raise TransferError("aborted")
            came.tokens += page_size * len(waiting)
            waiting.clear()

        try:
            for parcel in self._until_ended(job, job.fetching):
                if parcel.page == ALIVE:
                    continue
                if parcel.offer is not None:
                    parcel = pulling.brought(parcel)
                    came.device_bytes += len(parcel.content)
                came.bytes += len(parcel.content)
                link = links[-1] if parcel.page == STATE else links[at] if at < count else b""
                if parcel.page not in (at, STATE) or not (
                    verified or parcel.digest == content_digest(link, parcel.page, parcel.content)
                ):
                    raise TransferError("wrong_digest", f"page {parcel.page} is not what was asked for")
                if parcel.page == STATE:
                    write()
                    came.state = at == count and self._write_in_turn(
                        job, lambda parcel=parcel: self._write_state(job, parcel)
                    )
                    break
                waiting.append(parcel)
                at += 1
                since = since or time.monotonic()
                if at == count or len(waiting) >= PARCEL or time.monotonic() - since > WRITE_S:
                    write()
                    since = 0.0
                    if at == count and came.state:
                        break
        except TransferError:
            if not job.why:
                write()  # what was verified counts
            raise
        write()

    def _pulling(self, job: _Job) -> Pulling:
        """What is offered instead of sent."""
        transport, address = self._transport, job.address

        def tell(number: int) -> None:
            if transport is not None:
                transport.pulled(address, number)

        return Pulling(self._link, address, lambda: job.why, tell)

    def _until_ended(self, job: _Job, fetching: Fetching) -> Iterator[Parcel]:
        try:
            for parcel in fetching:
                job.heard = time.monotonic()
                yield parcel
                if job.why:
                    raise TransferError(job.why)
        finally:
            fetching.cancel()

    def _write_in_turn(self, job: _Job, function: Callable[[], bool]) -> bool:
        """Writes between two steps, one parcel of one transfer at a time: however many there are, running streams wait for one."""
        job.ours = True
        try:
            with self._turn:
                return self._call(function)
        finally:
            job.heard, job.ours = time.monotonic(), False

    def _call(self, function: Callable[[], Any]) -> Any:
        return self._engine.call(function, CALL_S)

    @property
    def _has_states(self) -> bool:
        return self._engine.runner.executor.states is not None

    # ---- on the engine's thread ----

    def _is_awaited(self, job: _Job) -> bool:
        request = self._engine.scheduler.requests.get(job.request.request_id)
        return (
            request is not None and request.state is RequestState.RECEIVING and request.spec is job.request and not job.why
            and tuple(map(tuple, request.pages)) == job.landing.pages
        )  # fmt: skip

    def _write(self, job: _Job, parcels: list[Parcel]) -> bool:
        """Writes pages to where they were expected; False where they are not awaited any more."""
        if not self._is_awaited(job):
            return False
        landing, moves, contents = job.landing, [], []
        for parcel in parcels:
            pages = [row[parcel.page] for row in landing.pages if row[parcel.page]]
            size = len(parcel.content) // max(1, len(pages))
            for group, page in enumerate(pages):
                moves.append(PageMove(landing.replica, page, b"in:%d:%d" % (parcel.page, group)))
                contents.append(memoryview(parcel.content)[group * size : (group + 1) * size])
        self._engine.runner.executor.take_pages(PagesIn.of(moves), [row_of(one, self._forms) for one in contents])
        return True

    def _write_state(self, job: _Job, parcel: Parcel) -> bool:
        states = self._engine.runner.executor.states
        if not self._is_awaited(job) or job.landing.row is None:
            return False
        states.write(job.landing.replica, job.landing.row, unpacked(parcel.content, states.arrays))
        return True

    def _arrive(self, job: _Job, tokens: int, clear: bool = False) -> None:
        """Has the request and its followers wait for their turn."""
        if self._jobs.get(job.request.request_id) is job:
            del self._jobs[job.request.request_id]
        scheduler = self._engine.scheduler
        for name in (job.request.request_id, *job.followers):
            request = scheduler.requests.get(name)
            if request is None or (name == job.request.request_id and request.spec is not job.request):
                continue
            if clear:
                request.digests.clear()
            scheduler.arrived(name, tokens if name == job.request.request_id else 0)
        job.followers.clear()
