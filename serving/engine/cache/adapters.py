"""Which adapters' matrices are on the devices, in which slot, and who runs with them. Plain Python."""

from __future__ import annotations

from collections import Counter

from serving.engine.requests.request import Request


class AdapterSlots:
    """Slots 1 to `slots`, least recently used first to be given on; slot 0 is nobody's.

    A slot is taken from an adapter only while no running request has it. Steps in flight may still use it: loading another is a
    command behind them.
    """

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots, 0, -1))
        self._slot: dict[str, int] = {}  # digest -> slot, the least recently taken first
        self._users: Counter[str] = Counter()
        self._live: Counter[str] = Counter()
        self._loads: list[tuple[int, str]] = []
        self.num_loaded = 0  # so far

    @property
    def num_free(self) -> int:
        """Slots that no adapter is in."""
        return len(self._free)

    @property
    def running(self) -> frozenset[str]:
        """Digests of adapters that running requests have."""
        return frozenset(self._users)

    @property
    def waiting(self) -> frozenset[str]:
        """Digests of adapters that requests have which do not run."""
        return frozenset(digest for digest, count in self._live.items() if count > self._users[digest])

    def arrive(self, request: Request) -> None:
        """The request is live from now on."""
        if request.spec.adapter is not None:
            self._live[request.spec.adapter] += 1

    def depart(self, request: Request) -> None:
        """It has ended."""
        digest = request.spec.adapter
        if digest is not None:
            self._live[digest] -= 1
            if not self._live[digest]:
                del self._live[digest]

    def take(self, request: Request) -> bool:
        """Gives an adapter of a request that is about to run a slot; False while there is none."""
        digest = request.spec.adapter
        if digest is None:
            return True
        slot = self._slot.pop(digest, None)
        if slot is None:
            if not self._free:
                idle = next((other for other in self._slot if not self._users[other]), None)
                if idle is None:
                    return False
                self._free.append(self._slot.pop(idle))
            slot = self._free.pop()
            self._loads.append((slot, digest))
        self._slot[digest] = slot
        self._users[digest] += 1
        request.adapter_slot = slot
        return True

    def leave(self, request: Request) -> None:
        """The request runs no more."""
        digest = request.spec.adapter
        if digest is None or not request.adapter_slot:
            return
        request.adapter_slot = 0
        self._users[digest] -= 1
        if not self._users[digest]:
            del self._users[digest]
            load = (self._slot[digest], digest)
            if (
                load in self._loads
            ):  # it did not come to run: nobody may hold the matrices any more when the next step is
                self._loads.remove(load)
                self.forget(digest)

    def forget(self, digest: str) -> None:
        """Gives the slot of an adapter back that nobody runs with."""
        if digest in self._slot and not self._users[digest]:
            self._free.append(self._slot.pop(digest))

    def clear(self) -> None:
        """Nothing is on the devices any more, and nobody runs."""
        assert not self._users, "adapters are taken away from running requests"
        for digest in list(self._slot):
            self.forget(digest)
        self._loads.clear()

    def take_step(self) -> tuple[tuple[int, str], ...]:
        """(slot, digest) of what is to be loaded before the next step. A slot that was given on twice in between is in it once."""
        loads = tuple({slot: (slot, digest) for slot, digest in self._loads}.values())
        self._loads.clear()
        self.num_loaded += len(loads)
        return loads
