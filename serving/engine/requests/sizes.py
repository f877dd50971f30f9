"""How large an engine is, once everything is decided. What decides it: `serving/engine/device/sizing.py`."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Resolved sizes of an engine; of each replica, where its mesh holds several.

    Attributes:
        page_bytes: of one page in all arrays, over all devices together.
        num_snapshots: copies of recurrent layers' states that may be kept for prefixes.
        layers_per_page: layers (of those that keep most) that a page holds a part of a sequence for; None for all. See
            ops.paged_attention.groups.
        draft_tokens: drafts that a step verifies of a request at most; 0 for none.
        draft_places: places that the rows of a step with drafts have together at most.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    page_bytes: int
    kv_dtype: str
    layers_per_page: int | None = None
    num_snapshots: int = 0
    draft_tokens: int = 0
    draft_places: int = 0
