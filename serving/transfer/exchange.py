"""Both sides of one engine as its loop sees them, and what puts them beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

from serving.engine.api.peers.stats import TransferStats
from serving.engine.api.peers.transfers import Transport
from serving.engine.api.types import EngineOutput, EngineRequest
from serving.engine.engine import Engine
from serving.transfer.config import TransferConfig
from serving.transfer.device_link import link_of
from serving.transfer.disk import DiskTier
from serving.transfer.forms import forms_of
from serving.transfer.giving import Giving
from serving.transfer.identity import identity_of
from serving.transfer.ledger import Ledger
from serving.transfer.taking import Taking

LOOK_S = 0.2
"""How often leases and transfers are looked after."""


class Exchange:
    """`Peers` of an engine's loop.

    Attributes:
        giving, taking: the sides that its role has.
        disk: pages in files, and what takes them back; None without.
    """

    def __init__(
        self, giving: Giving | None, taking: Taking | None, ledger: Ledger, disk: tuple[DiskTier, Taking] | None = None
    ) -> None:
        self.giving = giving
        self.taking = taking
        self.disk = disk
        self._takers = [one for one in (taking, disk and disk[1]) if one is not None]
        self._ledger = ledger

    def submitted(self, request: EngineRequest) -> None:
        """See Peers."""
        told = request.transfer
        if told is None:
            if self.disk is not None:
                self.disk[1].from_disk(request, self.disk[0])
            return
        if told.remote_prefill and told.host and told.port and self.taking is not None:
            self.taking.submitted(request)
        if told.remote_decode and self.giving is not None:
            self.giving.submitted(request)

    def emitted(self, outputs: list[EngineOutput]) -> list[EngineOutput]:
        """See Peers."""
        for taker in self._takers:
            if taker.busy:
                for output in outputs:
                    if output.finish_reason is not None:
                        taker.ended(output.request_id)
        return outputs if self.giving is None else [self.giving.emitted(output) for output in outputs]

    def give_way(self) -> bool:
        """See Peers."""
        gave = self.giving is not None and self.giving.give_way()
        return gave or any(taker.receiving > 0 for taker in self._takers)

    def look(self) -> float | None:
        """See Peers."""
        busy = False
        if self.giving is not None:
            self.giving.expire()
            busy = bool(self.giving.leases)
        for taker in self._takers:
            taker.expire()
            busy = busy or taker.busy
        return LOOK_S if busy else None

    def weights_changed(self) -> None:
        """See Peers."""
        if self.giving is not None:
            self.giving.weights_changed()
        for taker in self._takers:
            taker.weights_changed(self.giving.identity if self.giving is not None else b"")
        if self.disk is not None:
            self.disk[0].stop()

    @property
    def stats(self) -> TransferStats:
        """See Peers."""
        return self._ledger.stats(
            leases=0 if self.giving is None else len(self.giving.leases),
            leased_pages=0 if self.giving is None else self.giving.leased_pages,
            receiving=self._takers[0].receiving if self._takers else 0,
        )


def exchange_pages(
    engine: Engine,
    config: TransferConfig,
    weights: bytes,
    facts: Sequence[Any],
    transport: Transport | None,
    disk: tuple[pathlib.Path, int] | None = None,
) -> Exchange:
    """Has an engine give pages to others, or take them, as its role says. Before its loop runs.

    Args:
        weights: digest of the checkpoint.
        facts: see `identity_of`; the model's configuration is the first.
        transport: how pages come; None where it takes none. Closed with the engine.
        disk: where pages go that leave host memory, and how many bytes of them at most; None: nowhere.
    Raises:
        ValueError: the folder cannot be used, or arrays cannot go from device to device, which was asked for.
    """
    executor, ledger = engine.runner.executor, Ledger()
    states = () if executor.states is None else executor.states.arrays
    shared = any(spec.kinds for spec in executor.groups.arrays)
    forms = forms_of(executor.page_arrays, facts[0], executor.mesh, shared)
    if shared:
        facts = (*facts, f"heads over {1 if executor.mesh is None else executor.mesh.shape.get('model', 1)} devices")
    identity = identity_of(weights, facts, [(one.shape, one.dtype) for one in forms], states)
    link = link_of(config, forms, executor.page_arrays)
    giving = Giving(engine, config, identity, ledger, forms, link) if config.gives else None
    taking = None
    if config.takes:
        assert transport is not None, "an engine that takes pages needs a way for them"
        taking = Taking(engine, config, identity, transport, ledger, forms, link)
    kept = None
    if disk is not None:
        shapes = [a.shape[1:] for a in executor.page_arrays]
        identity = identity_of(weights, facts, [(a.shape[1:], a.dtype) for a in executor.page_arrays], states)
        tier = DiskTier(disk[0], identity, disk[1], shapes)
        executor.store.on_drop = lambda replica, key, page: tier.keep(key, page)
        kept = tier, Taking(engine, config, identity, None, ledger)
    exchange = Exchange(giving, taking, ledger, kept)
    engine.loop.peers, engine.page_source = exchange, giving

    def stop() -> None:
        if taking is not None:
            taking.close()
        if giving is not None:
            giving.close()
        if transport is not None:
            transport.close()
        if link is not None:
            link.close()
        if kept is not None:
            kept[1].close()
            for key in executor.store.all_of(0):  # what host memory has is of use to the next process
                kept[0].keep(key, executor.store.find(0, key)())
            kept[0].close()

    engine.stop_peers = stop
    return exchange
