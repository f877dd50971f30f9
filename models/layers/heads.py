"""Attention heads on a mesh whose `model` axis does not divide them: KV heads are repeated or padded until it does.

A device must own whole KV heads with query heads that read them. With fewer KV heads than devices each is repeated, and
the query heads that read it are dealt out among its copies; what is still missing to a multiple is padded with heads
whose weights are zero. Either way every device computes on 1 / S of the (padded) heads, and the result is the same.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class PlacedHeads:
    """K KV heads of G query heads each, spread over `shards` devices.

    Attributes:
        K, G, h: as the checkpoint has them; h is the size of a head.
        shards: devices on the axis.
    """

    K: int
    G: int
    h: int
    shards: int

    @property
    def copies(self) -> int:
        """How often each KV head is there."""
        return min(self.G, max(1, self.shards // self.K)) if self.K % self.shards else 1

    @property
    def group(self) -> int:
        """Query heads of each placed KV head."""
        return -(-self.G // self.copies)

    @property
    def kv_heads(self) -> int:
        """Placed KV heads, a multiple of `shards`."""
        return -(-self.K * self.copies // self.shards) * self.shards

    @property
    def unchanged(self) -> bool:
        return (self.kv_heads, self.group) == (self.K, self.G)

    def queries(self, stored: np.ndarray) -> np.ndarray:
        """[K, G, ...] -> [kv_heads, group, ...], zeros for the heads that are none."""
        rest = stored.shape[2:]
        dealt = np.zeros((self.K, self.copies * self.group, *rest), stored.dtype)
        dealt[:, : self.G] = stored
        placed = np.zeros((self.kv_heads, self.group, *rest), stored.dtype)
        placed[: self.K * self.copies] = dealt.reshape(self.K * self.copies, self.group, *rest)
        return placed

    def keys(self, stored: np.ndarray) -> np.ndarray:
        """[K, ...] -> [kv_heads, ...]: repeated, then zeros."""
        placed = np.zeros((self.kv_heads, *stored.shape[1:]), stored.dtype)
        placed[: self.K * self.copies] = np.repeat(stored, self.copies, axis=0)
        return placed


@dataclasses.dataclass(frozen=True)
class Spread:
    """How a parameter of attention is made from the one that the checkpoint describes.

    Attributes:
        heads: where they go.
        part: "qkv" (rows [K, G + 2, h]), "queries" (rows [K, G, h]), "out" (columns [K, G, h]) or "sinks" ([K, G]).
    """

    heads: PlacedHeads
    part: str

    def stored_shape(self, placed: tuple[int, ...]) -> tuple[int, ...]:
        """The checkpoint's shape of a parameter whose own is `placed`."""
        K, G, h = self.heads.K, self.heads.G, self.heads.h
        if self.part in ("qkv", "queries"):
            return (K * (G + 2 * (self.part == "qkv")) * h, *placed[1:])
        return (K, G) if self.part == "sinks" else (*placed[:-1], K * G * h)

    def apply(self, stored: np.ndarray) -> np.ndarray:
        """The parameter's array."""
        K, G, h = self.heads.K, self.heads.G, self.heads.h
        if self.part == "sinks":
            return self.heads.queries(stored.reshape(K, G))
        if self.part == "out":
            columns = np.moveaxis(stored.reshape(-1, K, G, h), 0, -1)
            placed = np.moveaxis(self.heads.queries(columns), -1, 0)
            return np.ascontiguousarray(placed.reshape(*stored.shape[:-1], -1))
        rest = stored.shape[1:]
        if self.part == "queries":
            return self.heads.queries(stored.reshape(K, G, h, *rest)).reshape(-1, *rest)
        rows = stored.reshape(K, G + 2, h, *rest)
        parts = [self.heads.queries(rows[:, :G])]
        parts += [self.heads.keys(rows[:, G + i])[:, None] for i in range(2)]
        return np.concatenate(parts, axis=1).reshape(-1, *rest)
