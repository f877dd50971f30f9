"""Batches as messages: msgpack in vLLM's shapes (`KVEventBatch` of `BlockStored`, `BlockRemoved`, `AllBlocksCleared`)."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from serving.engine.api.page_events import PageBatch, PageEvent, PagesRemoved, PagesStored

MEDIUM = "GPU"
"""What vLLM calls the device's own memory, whatever the device is."""

STORED = (
    "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name", "extra_keys", "group_idx",
    "kv_cache_spec_kind", "kv_cache_spec_sliding_window",
)  # fmt: skip
REMOVED = ("block_hashes", "medium", "group_idx")
"""The fields of each struct, in order: subscribers read arrays by position."""


class Encoder:
    """Makes messages.

    Args:
        as_maps: structs as maps with a `type`, instead of as arrays that begin with it.
    """

    def __init__(self, as_maps: bool = False) -> None:
        self._as_maps = as_maps
        self._pack = msgspec.msgpack.Encoder()

    def encode(self, batch: PageBatch, replica: int = 0) -> bytes:
        """One replica's events of a batch."""
        events = [self._event(one) for one in batch.events if one.replica == replica]
        if self._as_maps:
            return self._pack.encode({"ts": batch.time, "events": events, "data_parallel_rank": replica})
        return self._pack.encode([batch.time, events, replica])

    def _event(self, event: PageEvent) -> Any:
        if isinstance(event, PagesStored):
            name, fields, values = "BlockStored", STORED, _stored(event)
        elif isinstance(event, PagesRemoved):
            name, fields, values = "BlockRemoved", REMOVED, (list(event.hashes), MEDIUM, event.group)
        else:
            name, fields, values = "AllBlocksCleared", (), ()
        if self._as_maps:
            return {"type": name, **dict(zip(fields, values, strict=True))}
        return [name, *values]


def _stored(event: PagesStored) -> tuple[Any, ...]:
    extra = None if event.salt is None else [[event.salt]] * len(event.hashes)
    kind = "full_attention" if event.window is None else "sliding_window"
    tokens = np.frombuffer(event.tokens, "<u4").tolist()  # an image's marks, which are negative, are no token's
    return (
        list(event.hashes), event.parent, tokens, event.page_size, None, MEDIUM, event.adapter, extra, event.group, kind,
        event.window,
    )  # fmt: skip
