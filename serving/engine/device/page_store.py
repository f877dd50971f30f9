"""The bytes behind the host tier: copies of evicted pages in host memory, by prefix digest.

Copies out are asynchronous: the device starts them in the step that evicts, the host picks them up when that step has been
read. What is restored sooner comes straight from the copy that is still on the device.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.api import KVCache
from serving.engine.device.compiling import Program

GROUP = 16
"""Pages a copy program moves at once; shorter groups are padded with the null page."""


def read_pages(kv: KVCache, ids: jax.Array) -> Any:
    """The content of pages `ids` int32 [GROUP], every array of every layer along its page axis."""
    return jax.tree.map(lambda a: a[ids], kv)


def write_pages(kv: KVCache, ids: jax.Array, content: Any) -> KVCache:
    """Puts content back at `ids`; padding goes to the null page, which anyone may write."""
    return jax.tree.map(lambda a, c: a.at[ids].set(c), kv, content)


class PageStore:
    """Host copies by digest. One runner's.

    Attributes:
        restore_page_s: seconds that copying a page back takes, in a full group; measured by the first `restore`.
    """

    def __init__(self) -> None:
        self.restore_page_s = 0.0
        self._pages: dict[bytes, Any] = {}  # digest -> list of arrays, one a leaf
        self._pending: list[tuple[list[bytes], Any]] = []  # groups whose copies are on their way
        self._programs: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self._pages)

    @staticmethod
    def programs(kv: Any) -> list[Program]:
        """The two copy programs for a cache of these abstract arrays."""
        ids = jax.ShapeDtypeStruct((GROUP,), jnp.int32)
        content = jax.eval_shape(read_pages, kv, ids)
        return [
            Program("read_pages", read_pages, (kv, ids)),
            Program("write_pages", write_pages, (kv, ids, content), donate=(0,)),
        ]

    def bind(self, programs: dict[str, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def spill(self, kv: KVCache, pages: tuple[tuple[int, bytes], ...]) -> None:
        """Starts copying pages out."""
        for start in range(0, len(pages), GROUP):
            group = pages[start : start + GROUP]
            leaves = jax.tree.leaves(self._programs["read_pages"](kv, _ids(group)))
            for leaf in leaves:
                leaf.copy_to_host_async()
            digests = [digest for _, digest in group]
            self._pending.append((digests, leaves))
            for row, digest in enumerate(digests):
                self._pages[digest] = (leaves, row)

    def restore(self, kv: KVCache, pages: tuple[tuple[int, bytes], ...]) -> KVCache:
        """Copies pages back in. Every digest must be here. The first call, warm-up's, does it twice and times it."""
        if not self.restore_page_s:
            kv = jax.block_until_ready(self._restore(kv, pages[:GROUP]))
            began = time.perf_counter()
            kv = jax.block_until_ready(self._restore(kv, pages[:GROUP]))
            self.restore_page_s = (time.perf_counter() - began) / GROUP
        return self._restore(kv, pages)

    def _restore(self, kv: KVCache, pages: tuple[tuple[int, bytes], ...]) -> KVCache:
        treedef = jax.tree.structure(kv)
        for start in range(0, len(pages), GROUP):
            group = pages[start : start + GROUP]
            rows = [self._row(digest) for _, digest in group]
            rows += [rows[0]] * (GROUP - len(rows))
            content = jax.tree.unflatten(treedef, [np.stack(leaf) for leaf in zip(*rows, strict=True)])
            kv = self._programs["write_pages"](kv, _ids(group), content)
        return kv

    def drop(self, digests: tuple[bytes, ...]) -> None:
        for digest in digests:
            del self._pages[digest]

    def settle(self) -> None:
        """Moves finished copies into host memory of their own, so that the device's are freed."""
        for digests, leaves in self._pending:
            host = [np.asarray(leaf) for leaf in leaves]
            for row, digest in enumerate(digests):
                held = self._pages.get(digest)
                if held is not None and held[0] is leaves:
                    self._pages[digest] = ([leaf[row].copy() for leaf in host], None)
        self._pending.clear()

    def _row(self, digest: bytes) -> list[np.ndarray]:
        leaves, row = self._pages[digest]
        return leaves if row is None else [np.asarray(leaf)[row] for leaf in leaves]


def _ids(group: tuple[tuple[int, bytes], ...]) -> np.ndarray:
    ids = np.zeros(GROUP, np.int32)
    ids[: len(group)] = [page for page, _ in group]
    return ids
