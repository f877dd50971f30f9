"""The bytes behind the host tier: copies of evicted pages in host memory, by replica and key.

Every process keeps those parts of a page that its own devices hold, and no other: where KV heads are cut over processes each
has some heads of every page, where replicas lie in different processes each has its replica's pages. Nothing is sent.

Copies out are asynchronous: the device starts them in the step that evicts, and they are moved to host memory of their own once
they have come. What is copied back sooner comes from the copy that is still on the device.
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.api import KVCache
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.stores.parts import Part, part_of, parts_here, slices, whole
from serving.engine.requests.commands import PageMoves, PagesDropped, PagesIn, PagesOut

READ, WRITE = ProgramKey("read_pages"), ProgramKey("write_pages")

PARCEL = 16
"""Pages of each replica that a copy program moves at once; shorter parcels are padded with the null page."""


def read_pages(kv: KVCache, ids: jax.Array) -> Any:
    """The content of pages `ids` int32 [PARCEL], every array of every layer along its page axis."""
    return jax.tree.map(lambda a: a[ids], kv)


def write_pages(kv: KVCache, ids: jax.Array, content: Any) -> KVCache:
    """Puts content back at `ids`; padding goes to the null page, which anyone may write."""
    return jax.tree.map(lambda a, c: a.at[ids].set(c), kv, content)


def _memory(shard: jax.Array) -> np.ndarray:
    """A CPU device's part of an array as memory that can be written. Nobody may be computing with it."""
    pointer: int = shard.unsafe_buffer_pointer()
    raw = memoryview((ctypes.c_uint8 * shard.nbytes).from_address(pointer)).cast("B")
    return np.frombuffer(raw, np.uint8).view(shard.dtype).reshape(shard.shape)


@dataclasses.dataclass(frozen=True)
class _Parcel:
    """One run of the program that reads, on its way to the host.

    Attributes:
        held: (replica, key) -> row of its replica's part.
        leaves: of each array, the parts that this process's devices hold: (replica, part) -> [PARCEL, ...].
    """

    held: dict[tuple[int, bytes], int]
    leaves: list[dict[tuple[int, Part], Any]]

    @property
    def ready(self) -> bool:
        return all(array.is_ready() for leaf in self.leaves for array in leaf.values())

    def page(self, replica: int, key: bytes) -> list[dict[Part, np.ndarray]]:
        """A page's parts, in memory of their own."""
        row = self.held[replica, key]
        return [
            {part: np.asarray(array)[row].copy() for (of, part), array in leaf.items() if of == replica}
            for leaf in self.leaves
        ]


@dataclasses.dataclass(frozen=True)
class Lent:
    """Pages on their way to the host, for somebody on another thread. Holds the copies, not the pages."""

    _parcels: list[_Parcel]
    _keys: list[tuple[int, bytes]]
    _shapes: list[tuple[int, ...]]

    @property
    def on_device(self) -> list[jax.Array] | None:
        """The copies where they are, every array's [PARCEL, ...] with the pages in their order; None where they are cut over
        devices, or are more than a parcel."""
        (replica, _), *_ = self._keys
        found = [[array for (of, _), array in leaf.items() if of == replica] for leaf in self._parcels[0].leaves]
        if len(self._parcels) > 1 or any(len(parts) != 1 for parts in found):
            return None
        arrays = [part for (part,) in found]
        same = all(a.shape == (PARCEL, *shape) for a, shape in zip(arrays, self._shapes, strict=True))
        return arrays if same else None

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        """Of each page in turn, every array's row, put together from the devices' parts. Waits for the copies."""
        for replica, key in self._keys:
            parcel = next(one for one in self._parcels if (replica, key) in one.held)
            yield [whole(parts, shape) for parts, shape in zip(parcel.page(replica, key), self._shapes, strict=True)]


class PageStore:
    """Host copies of one process.

    Args:
        replicas: whose pages lie end to end along the first axis of every array.

    Attributes:
        restore_page_s: seconds that copying a page back takes, in a full parcel; measured by the first `put_back`.
        on_drop: told each page that is forgotten; what it is given may still be on its way here.
    """

    def __init__(self, replicas: int = 1) -> None:
        self.restore_page_s = 0.0
        self.on_drop: Callable[[int, bytes, list[dict[Part, np.ndarray]]], None] | None = None
        self._replicas = replicas
        self._pages: dict[tuple[int, bytes], list[dict[Part, np.ndarray]] | _Parcel] = {}
        self._pending: list[_Parcel] = []
        self._programs: dict[ProgramKey, Any] = {}
        self._in_memory = jax.default_backend() == "cpu"
        self._reads: list[Any] = []  # one array of what each program gave that may still be reading pages

    def __len__(self) -> int:
        return len(self._pages)

    @staticmethod
    def programs(kv: Any) -> list[Program]:
        """The copy programs for one replica's cache of these abstract arrays."""
        ids = jax.ShapeDtypeStruct((PARCEL,), jnp.int32)
        content = jax.tree.map(lambda a: jax.ShapeDtypeStruct((PARCEL, *a.shape[1:]), a.dtype, sharding=a.sharding), kv)
        found = [Program(READ, read_pages, (kv, ids), shared=())]
        if jax.default_backend() != "cpu":  # there they are written in memory
            found.append(Program(WRITE, write_pages, (kv, ids, content), donate=(0,), shared=()))
        return found

    def bind(self, programs: dict[ProgramKey, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def take_out(self, kv: KVCache, moves: PagesOut) -> None:
        """Starts copying pages out."""
        for ids, keys in self._parcels(moves):
            content = jax.tree.leaves(self._programs[READ](kv, ids))
            if self._in_memory:
                self._reads = [*(array for array in self._reads if not array.is_ready()), content[0]]
            leaves = [self._parts(array) for array in content]
            here = {replica for leaf in leaves for replica, _ in leaf}
            held = {(r, key): row for r in here for row, key in enumerate(keys[r])}
            for leaf in leaves:
                for array in leaf.values():
                    array.copy_to_host_async()
            parcel = _Parcel(held, leaves)
            self._pending.append(parcel)
            self._pages.update(dict.fromkeys(held, parcel))

    def put_back(self, kv: KVCache, moves: PagesIn) -> KVCache:
        """Copies pages back in. What is asked for must be here. The first call, warm-up's, does it twice and times it."""
        if not self.restore_page_s:
            kv = jax.block_until_ready(self._put_back(kv, moves))
            began = time.perf_counter()
            kv = jax.block_until_ready(self._put_back(kv, moves))
            self.restore_page_s = (time.perf_counter() - began) / PARCEL
        return self._put_back(kv, moves)

    def lend(self, kv: KVCache, moves: PagesOut) -> Lent:
        """Starts copying pages out for somebody who takes them away: nothing is kept here."""
        before = len(self._pending)
        self.take_out(kv, moves)
        parcels = self._pending[before:]
        del self._pending[before:]
        keys = list(zip(moves.replicas.tolist(), moves.keys, strict=True))
        for replica, key in keys:
            self._pages.pop((replica, key), None)
        return Lent(parcels, keys, [a.shape[1:] for a in jax.tree.leaves(kv)])

    def accept(self, kv: KVCache, replica: int, key: bytes, rows: list[np.ndarray]) -> None:
        """Takes a page that came from elsewhere, whole, as if it had been taken out here."""
        arrays = jax.tree.leaves(kv)
        self._pages[replica, key] = [
            {part: np.ascontiguousarray(row[slices(part)]) for part in parts_here(array)}
            for row, array in zip(rows, arrays, strict=True)
        ]

    def drop(self, moves: PagesDropped) -> None:
        """Forgets pages."""
        for replica, key in zip(moves.replicas.tolist(), moves.keys, strict=True):
            page = self._pages.pop((replica, key), None)  # other processes have others
            if page is not None and self.on_drop is not None:
                self.on_drop(replica, key, page.page(replica, key) if isinstance(page, _Parcel) else page)

    def discard(self, moves: PagesIn) -> None:
        """Forgets pages that were only passed through."""
        for replica, key in zip(moves.replicas.tolist(), moves.keys, strict=True):
            self._pages.pop((replica, key), None)

    def find(self, replica: int, key: bytes) -> Callable[[], list[dict[Part, np.ndarray]]] | None:
        """Gives a page's parts, on whatever thread; None where the page is not here."""
        page = self._pages.get((replica, key))
        if page is None:
            return None
        return (lambda: page.page(replica, key)) if isinstance(page, _Parcel) else (lambda: page)

    def all_of(self, replica: int) -> list[bytes]:
        """Keys of a replica's pages here."""
        return [key for of, key in self._pages if of == replica]

    def settle(self) -> None:
        """Moves copies that have come into host memory of their own, so that the device's are freed. Does not wait."""
        while self._pending and self._pending[0].ready:
            parcel = self._pending.pop(0)
            for replica, key in parcel.held:
                if self._pages.get((replica, key)) is parcel:
                    self._pages[replica, key] = parcel.page(replica, key)

    def _put_back(self, kv: KVCache, moves: PagesIn) -> KVCache:
        if self._in_memory:
            self._write_memory(kv, moves)
            return kv
        arrays, treedef = jax.tree.flatten(kv)
        for ids, keys in self._parcels(moves):
            pages = [[self._page(replica, key) for key in of] for replica, of in enumerate(keys)]
            content = [self._array(array, i, pages) for i, array in enumerate(arrays)]
            kv = self._programs[WRITE](kv, ids, jax.tree.unflatten(treedef, content))
        return kv

    def _write_memory(self, kv: KVCache, moves: PagesIn) -> None:
        """Writes pages where they lie, once nothing computes with any. XLA's scatter of bfloat16 copies the whole cache on CPU, as
        float32 and back: 0.5 s for 0.5 GiB, for however few pages."""
        jax.block_until_ready((kv, self._reads))
        self._reads.clear()
        held: list[list[tuple[int, Part, np.ndarray]]] = []  # of each array: whose, which part of a row, where
        for array in jax.tree.leaves(kv):
            rows = array.shape[0] // self._replicas
            held.append(
                [((s.index[0].start or 0) // rows, part_of(s.index), _memory(s.data)) for s in array.addressable_shards]
            )
        here = {of for of, _, _ in held[0]}
        for replica, number, key in zip(moves.replicas.tolist(), moves.pages.tolist(), moves.keys, strict=True):
            if replica not in here:
                continue  # another process's
            page = self._page(replica, key)
            if page is None:
                raise RuntimeError(f"what is to be copied back to page {number} is not in this process's host memory")
            for leaf, shards in enumerate(held):
                for of, part, memory in shards:
                    if of == replica:
                        memory[number] = page[leaf][part]

    def _array(self, like: jax.Array, leaf: int, pages: list[list[list[dict[Part, np.ndarray]] | None]]) -> jax.Array:
        """One array of a parcel's content, cut as the pages are; of each device's part only what is here is looked up."""

        def part_of(index: Any) -> np.ndarray:
            replica, part = self._place(index)
            content = np.zeros((PARCEL, *own[1:]), like.dtype)
            for row, page in enumerate(pages[replica]):
                if page is None:
                    raise RuntimeError(f"page {row} of a parcel to copy back is not in this process's host memory")
                content[row] = page[leaf][part]
            return content

        shape = (self._replicas * PARCEL, *like.shape[1:])
        own = like.sharding.shard_shape(shape)
        return jax.make_array_from_callback(shape, like.sharding, part_of)

    def _parts(self, array: jax.Array) -> dict[tuple[int, Part], Any]:
        """The different parts of an array that this process's devices hold."""
        return {self._place(shard.index): shard.data for shard in array.addressable_shards}

    def _place(self, index: tuple[slice, ...]) -> tuple[int, Part]:
        """Of a device's part of an array: which replica's, and which part of a page."""
        return (index[0].start or 0) // PARCEL, part_of(index)

    def _page(self, replica: int, key: bytes) -> list[dict[Part, np.ndarray]] | None:
        """A page's parts; None where it is in other processes."""
        held = self._pages.get((replica, key))
        return held.page(replica, key) if isinstance(held, _Parcel) else held

    def _parcels(self, moves: PageMoves) -> Iterator[tuple[np.ndarray, list[list[bytes]]]]:
        """(ids int32 [replicas * PARCEL], keys of each replica) of each run of a program that it takes."""
        of: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
        for replica, page, key in zip(moves.replicas.tolist(), moves.pages.tolist(), moves.keys, strict=True):
            of[replica].append((page, key))
        for start in range(0, max(map(len, of.values()), default=0), PARCEL):
            parcels = [of[replica][start : start + PARCEL] for replica in range(self._replicas)]
            ids = np.zeros((self._replicas, PARCEL), np.int32)
            for replica, parcel in enumerate(parcels):
                ids[replica, : len(parcel)] = [page for page, _ in parcel]
            yield ids.reshape(-1), [[key for _, key in parcel] for parcel in parcels]
