"""Pages from device to device: arrays that one process offers and another pulls, by `jax.experimental.transfer`.

Only the content goes this way. What is wanted, what is offered, by which digests it is known and when it is over is said over the
engines' own protocol, so whoever pulls knows that what it pulls was there. It waits no longer than its transfer may take, and drops
what did not come by then: jax fills the arrays or never does, nobody looks at them.

jax looks at the deadlines of offers only when something else is offered. So a thread offers a few bytes when one is over.
"""

from __future__ import annotations

import datetime
import ipaddress
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib.version
import numpy as np

from serving.engine.api.peers.transfers import DeviceWay, Offer, Parcel, TransferError
from serving.engine.device.stores.page_store import PARCEL
from serving.engine.device.stores.parts import packed, row_bytes
from serving.transfer.config import TransferConfig
from serving.transfer.forms import Form
from sharding.address import own_address

log = logging.getLogger(__name__)

ACCELERATORS = ("gpu", "tpu")
MOST_OFFERED = 256 * 2**20
"""Bytes of copies that may wait to be pulled, beside the first."""
CONNECT_S = 2.0
"""How long a peer's transfer server may take to answer."""
DOUBT_S = 60.0
"""How long pages of a peer are asked for over gRPC after something did not come from its device."""
LONGEST_PAUSE_S = 0.01
"""Between two looks whether what is pulled is here."""


def is_chosen(config: TransferConfig, platform: str) -> bool:
    """Whether an engine on this platform offers and pulls pages: not over a network that is to be encrypted."""
    if config.transport == "auto":
        return platform in ACCELERATORS and config.client_tls is None
    return config.transport == "device"


def listening(config: TransferConfig) -> str:
    """The address of this machine at which others pull: `host`, or 127.0.0.1 where peers are of this machine.

    Raises:
        OSError: a name that nobody knows, or no address.
    """
    if config.host:
        host = config.host.strip("[]")
        return host if _is_address(host) else socket.gethostbyname(host)
    here = all(peer == "localhost" or _is_loopback(peer) for peer in config.peers)
    return "127.0.0.1" if here else own_address()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(peer: str) -> bool:
    try:
        return ipaddress.ip_network(peer, strict=False).is_loopback
    except ValueError:
        return False


def link_of(config: TransferConfig, forms: Sequence[Form], arrays: Sequence[Any]) -> DeviceLink | None:
    """An engine's link; None where its pages go over gRPC.

    Args:
        arrays: its pages.
    Raises:
        ValueError: `transport` is "device", and that cannot be here.
    """
    if config.transport == "grpc" or not config.role or not arrays:
        return None
    device = min((shard.device for shard in arrays[0].addressable_shards), key=lambda one: one.id)
    if not is_chosen(config, device.platform):
        return None
    try:
        link = DeviceLink(forms, device, listening(config), config.lease_s)
        log.info("pages go from device to device where a peer can (%s, %s)", link.address, link.way.version)
        return link
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        if config.transport == "device":
            raise ValueError(
                f"kv_transfer_config: transport is device, and no transfer server starts: {error}"
            ) from error
        log.warning("no transfer server starts (%s); pages go over gRPC", error)
        return None


class DeviceLink:
    """A process's transfer server. Any thread may call it.

    Args:
        forms: how pages travel; those of both sides are the same where their identities are.
        device: on which pages are here.
        host: the IP address at which others pull.
        lease_s: how long what is offered may wait.

    Attributes:
        way: what both sides must have in common.
        row_bytes: of a page of one group.
    """

    def __init__(self, forms: Sequence[Form], device: Any, host: str, lease_s: float) -> None:
        from jax.experimental import transfer

        at = f"[{host}]:0" if ":" in host else f"{host}:0"
        self.way = DeviceWay(device.platform, f"jaxlib {jaxlib.version.__version__}, {PARCEL} pages")
        self._server: Any = transfer.start_transfer_server(device.client, at, [at])
        self.address: str = self._server.address()
        here = jax.sharding.SingleDeviceSharding(device)
        self._expected = [jax.ShapeDtypeStruct((PARCEL, *one.shape), one.dtype, sharding=here) for one in forms]
        self.row_bytes = sum(row_bytes(self._expected))
        self._lease_s = lease_s
        self._nothing = jax.device_put(np.zeros(1, np.float32), device)
        self._offered: dict[int, float] = {}  # number -> time.monotonic() seconds when it is over
        self._changed = threading.Condition()
        self._sweeper: threading.Thread | None = None
        self._works = True
        self._connections: dict[str, tuple[str, Any]] = {}  # peer -> (where it offers, the way there)
        self._doubted: dict[str, float] = {}  # peer -> until when
        self._lock = threading.Lock()

    # ---- giving ----

    @property
    def waiting(self) -> int:
        """What is offered and was not pulled."""
        with self._changed:
            return len(self._offered)

    def has_room(self, timeout_s: float) -> bool:
        """Whether another parcel may be offered; waits so long for it."""
        most = max(1, MOST_OFFERED // (PARCEL * self.row_bytes))
        with self._changed:
            return self._changed.wait_for(lambda: len(self._offered) < most, timeout_s)

    def offer(self, arrays: Sequence[jax.Array]) -> Offer | None:
        """Offers a parcel, until its lease is over; None where that does not work.

        Args:
            arrays: of each form [PARCEL, *shape], on one device.
        """
        if not self._works:
            return None
        number = secrets.randbits(63)
        try:
            jax.block_until_ready(arrays)
            self._await(number, list(arrays), self._lease_s)
        except (RuntimeError, ValueError):
            log.exception("pages cannot be offered from the device; they go over gRPC")
            self._works = False
            return None
        with self._changed:
            self._offered[number] = time.monotonic() + self._lease_s
            self._changed.notify_all()
            if self._sweeper is None:
                self._sweeper = threading.Thread(target=self._sweep, name="jaxserve-offers", daemon=True)
                self._sweeper.start()
        return Offer(self.address, number, 0, 0)

    def pulled(self, number: int) -> None:
        """What was offered has come."""
        with self._changed:
            self._offered.pop(number, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Pulls nothing any more; what is offered stays until its lease is over."""
        with self._lock:
            self._connections.clear()

    def _await(self, number: int, arrays: list[jax.Array], lease_s: float) -> None:
        until = datetime.datetime.now() + datetime.timedelta(seconds=lease_s)
        self._server.await_pull(number, arrays, timeout=until)

    def _sweep(self) -> None:
        """Has jax give up what is over, until nothing is offered."""
        while True:
            with self._changed:
                if not self._offered:
                    self._sweeper = None
                    return
                now, first = time.monotonic(), min(self._offered.values())
                if first > now:
                    self._changed.wait(first - now + 0.05)
                    continue
                for number in [number for number, end in self._offered.items() if end <= now]:
                    del self._offered[number]
                self._changed.notify_all()
            try:
                self._await(secrets.randbits(63), [self._nothing], 0.0)
            except (RuntimeError, ValueError):
                log.exception("offers that are over cannot be given up; more pages are not offered")
                self._works = False

    # ---- taking ----

    def way_to(self, peer: str) -> DeviceWay | None:
        """How pages are to be offered by this peer; None where something did not come from there lately."""
        with self._lock:
            if self._doubted.get(peer, 0.0) > time.monotonic():
                return None
            self._doubted.pop(peer, None)
        return self.way if self._works else None

    def pull(self, peer: str, offer: Offer, why: Callable[[], str]) -> list[np.ndarray]:
        """Gets every array that was offered, on the host. Waits until `why` gives a reason not to.

        Args:
            peer: whoever made the offer.
        Raises:
            TransferError: it did not come.
        """
        try:
            arrays: list[Any] = self._connection(peer, offer.address).pull(offer.number, self._expected)
            pause = 0.0005
            while not all(array.is_ready() for array in arrays):
                if why():
                    raise TransferError(why())
                time.sleep(pause)
                pause = min(LONGEST_PAUSE_S, 1.5 * pause)
            return [np.asarray(array) for array in arrays]
        except TransferError as error:
            if error.reason != "aborted":
                self._doubt(peer)
            raise
        except (OSError, RuntimeError, ValueError) as error:
            self._doubt(peer)
            raise TransferError("not_pulled", f"nothing comes from the device of {offer.address}: {error}") from error

    def _connection(self, peer: str, address: str) -> Any:
        """The way to where a peer offers. One that was started anew does it elsewhere."""
        with self._lock:
            known = self._connections.get(peer)
        if known is not None and known[0] == address:
            return known[1]
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()  # jax would wait for longer
        connection = self._server.connect(address)
        with self._lock:
            self._connections[peer] = address, connection
        return connection

    def _doubt(self, peer: str) -> None:
        with self._lock:
            self._connections.pop(peer, None)
            self._doubted[peer] = time.monotonic() + DOUBT_S


class Pulling:
    """What one transfer pulls.

    Args:
        why: gives the reason for which it ended, or "".
        tell: told the number of each offer that has come.
    """

    def __init__(self, link: DeviceLink | None, peer: str, why: Callable[[], str], tell: Callable[[int], None]) -> None:
        self._link = link
        self._peer = peer
        self._why = why
        self._tell = tell
        self._number = -1
        self._arrays: list[np.ndarray] = []

    def brought(self, parcel: Parcel) -> Parcel:
        """A page that was offered, with its content.

        Raises:
            TransferError: it did not come.
        """
        offer = parcel.offer
        assert offer is not None
        if self._link is None or not 0 <= offer.first <= offer.first + offer.rows <= PARCEL:
            raise TransferError("not_pulled", f"page {parcel.page} is offered in a way that was not asked for")
        if offer.number != self._number:
            self._arrays = []
            self._arrays = self._link.pull(self._peer, offer, self._why)
            self._number = offer.number
            self._tell(offer.number)
        rows = range(offer.first, offer.first + offer.rows)
        content = b"".join(packed([array[row] for array in self._arrays]) for row in rows)
        return Parcel(parcel.page, content, parcel.digest)
