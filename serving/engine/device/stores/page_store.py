"""The bytes behind the host tier: copies of evicted pages in host memory, by replica and key.

Every process keeps those parts of a page that its own devices hold, and no other: where KV heads are cut over processes each
has some heads of every page, where replicas lie in different processes each has its replica's pages. Nothing is sent.

Copies out are asynchronous: the device starts them in the step that evicts, and they are moved to host memory of their own once
they have come. What is copied back sooner comes from the copy that is still on the device.
"""

from __future__ import annotations

import dataclasses
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.api import KVCache
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.requests.commands import PageMoves, PagesDropped, PagesIn, PagesOut

READ, WRITE = ProgramKey("read_pages"), ProgramKey("write_pages")

PARCEL = 16
"""Pages of each replica that a copy program moves at once; shorter parcels are padded with the null page."""

Part = tuple[tuple[int | None, int | None], ...]
"""Which part of a page's array a device holds: (start, stop) along each axis behind the first."""


def read_pages(kv: KVCache, ids: jax.Array) -> Any:
    """The content of pages `ids` int32 [PARCEL], every array of every layer along its page axis."""
    return jax.tree.map(lambda a: a[ids], kv)


def write_pages(kv: KVCache, ids: jax.Array, content: Any) -> KVCache:
    """Puts content back at `ids`; padding goes to the null page, which anyone may write."""
    return jax.tree.map(lambda a, c: a.at[ids].set(c), kv, content)


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


class PageStore:
    """Host copies of one process.

    Args:
        replicas: whose pages lie end to end along the first axis of every array.

    Attributes:
        restore_page_s: seconds that copying a page back takes, in a full parcel; measured by the first `put_back`.
    """

    def __init__(self, replicas: int = 1) -> None:
        self.restore_page_s = 0.0
        self._replicas = replicas
        self._pages: dict[tuple[int, bytes], list[dict[Part, np.ndarray]] | _Parcel] = {}
        self._pending: list[_Parcel] = []
        self._programs: dict[ProgramKey, Any] = {}

    def __len__(self) -> int:
        return len(self._pages)

    @staticmethod
    def programs(kv: Any) -> list[Program]:
        """The two copy programs for one replica's cache of these abstract arrays."""
        ids = jax.ShapeDtypeStruct((PARCEL,), jnp.int32)
        content = jax.tree.map(lambda a: jax.ShapeDtypeStruct((PARCEL, *a.shape[1:]), a.dtype, sharding=a.sharding), kv)
        return [
            Program(READ, read_pages, (kv, ids), shared=()),
            Program(WRITE, write_pages, (kv, ids, content), donate=(0,), shared=()),
        ]

    def bind(self, programs: dict[ProgramKey, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def take_out(self, kv: KVCache, moves: PagesOut) -> None:
        """Starts copying pages out."""
        for ids, keys in self._parcels(moves):
            content = jax.tree.leaves(self._programs[READ](kv, ids))
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

    def drop(self, moves: PagesDropped) -> None:
        """Forgets pages."""
        for replica, key in zip(moves.replicas.tolist(), moves.keys, strict=True):
            self._pages.pop((replica, key), None)  # other processes have others

    def settle(self) -> None:
        """Moves copies that have come into host memory of their own, so that the device's are freed. Does not wait."""
        while self._pending and self._pending[0].ready:
            parcel = self._pending.pop(0)
            for replica, key in parcel.held:
                if self._pages.get((replica, key)) is parcel:
                    self._pages[replica, key] = parcel.page(replica, key)

    def _put_back(self, kv: KVCache, moves: PagesIn) -> KVCache:
        arrays, treedef = jax.tree.flatten(kv)
        for ids, keys in self._parcels(moves):
            pages = [[self._page(replica, key) for key in of] for replica, of in enumerate(keys)]
            content = [self._array(array, i, pages) for i, array in enumerate(arrays)]
            kv = self._programs[WRITE](kv, ids, jax.tree.unflatten(treedef, content))
        return kv

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
        return (index[0].start or 0) // PARCEL, tuple((s.start, s.stop) for s in index[1:])

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
