"""A plan as one int32 array a program, so that a step costs one transfer (8 small ones: 280 us; one: 40 us).

The same layout object packs on the host (numpy) and unpacks inside the program (slices at static offsets, floats by bitcast).
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from models.api import Cross, Embeddings, Step
from ops.paged_attention.batch import Q_BLOCK, AttentionBatch
from ops.recurrent import RecurrentBatch
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.moves import Encoding
from serving.engine.requests.plan import CHUNK_ALIGN, Chunk, StepPlan, align
from serving.engine.requests.request import Request
from serving.engine.requests.slots import COLUMNS, SlotTable

assert CHUNK_ALIGN == Q_BLOCK, "the scheduler and the kernels must agree on where pieces start"


@dataclasses.dataclass(frozen=True)
class MediaShape:
    """How an engine reads images.

    Attributes:
        rows: embeddings that its store has room for, of each replica.
        width, dtype: numbers of one, and their type.
        axes: whether positions are three numbers.
        patches: P of the programs that encode, ascending.
        patch_dim: X, numbers of a patch.
        merge: side of the square of patches that become one embedding.
        lasting: a row of the store is no embedding but what all tokens of a sequence attend to, and all of a thing is one.
        together: whether an image's tokens attend to each other, also to those behind them.
        tile: patches of a tile, where an image has several; 0 where it is one grid.
        picked: K, rows of what the tower says that an embedding is the sum of; 0 where it is one of them.
        lines: embeddings that a tile may have beside those of its patches.
        per: patches that become one embedding where they are frames of sound; 0 of images.
        always: embeddings that every sound has; 0 where that depends on its length.
        ears: how it hears besides, into the same store; None where it does not, or does nothing else.
    """

    rows: int
    width: int
    dtype: str
    axes: bool
    patches: tuple[int, ...]
    patch_dim: int
    merge: int
    lasting: bool = False
    together: bool = False
    tile: int = 0
    picked: int = 0
    lines: int = 0
    per: int = 0
    always: int = 0
    ears: MediaShape | None = None

    def of(self, sound: bool) -> MediaShape:
        """How it reads a sound, or an image."""
        return self.ears if sound and self.ears is not None else self

    @property
    def most_patches(self) -> int:
        """Of an image, or frames of a sound."""
        return max(self.patches[-1], 0 if self.ears is None else self.ears.patches[-1])

    def embeddings(self, patches: int) -> int:
        """That an image of so many patches has at most."""
        if self.lasting or self.always:
            return self.always or 1
        return patches // (self.per or self.merge**2) + (self.lines * (patches // self.tile) if self.tile else 0)

    def read_in(self, bucket: Bucket) -> bool:
        """Whether steps of a bucket read the store."""
        return self.lasting or bucket.chunk > 0

    def bucket(self, patches: int) -> int:
        """P of the program for an image of so many patches."""
        return next(size for size in self.patches if size >= patches)

    @property
    def store(self) -> jax.ShapeDtypeStruct:
        """The store of one replica."""
        return jax.ShapeDtypeStruct((self.rows, self.width), jnp.dtype(self.dtype))

    def layout(self, patches: int) -> Layout:
        """What an image is, besides its patches: where they lie, how many there are, and where the embeddings go; a row of `rows`
        is nowhere. `pick_NK` and `share_NK` as in MediaItem."""
        N, K = self.embeddings(patches), self.picked
        fields = (("place_P2", (patches, 2), "int32"), ("count", (1,), "int32"), ("rows_N", (N,), "int32"))
        return Layout((*fields, ("pick_NK", (N, K), "int32"), ("share_NK", (N, K), "float32")) if K else fields)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Named fields with fixed shapes in one flat int32 array."""

    fields: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype

    @property
    def size(self) -> int:
        return self._places[-1][-1]

    def offset(self, name: str) -> int:
        """Where a field begins in the flat array."""
        names = [field for field, _, _ in self.fields]
        return sum(int(np.prod(shape)) for _, shape, _ in self.fields[: names.index(name)])

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of a flat int32 array."""
        out = {}
        for name, shape, dtype, offset, end in self._places:
            part = flat[offset:end]
            out[name] = (part if dtype == "int32" else part.view(dtype)).reshape(shape)
        return out

    @functools.cached_property
    def _places(self) -> tuple[tuple[str, tuple[int, ...], str, int, int], ...]:
        """The fields, and where each begins and ends. Kept: a step asks twice."""
        found, offset = [], 0
        for name, shape, dtype in self.fields:
            end = offset + math.prod(shape)
            found.append((name, shape, dtype, offset, end))
            offset = end
        return tuple(found)

    def unpack(self, flat: jax.Array) -> dict[str, jax.Array]:
        """The same fields inside a program."""
        out = {}
        offset = 0
        for name, shape, dtype in self.fields:
            count = int(np.prod(shape))
            part = jax.lax.slice(flat, (offset,), (offset + count,)).reshape(shape)
            out[name] = part if dtype == "int32" else jax.lax.bitcast_convert_type(part, jnp.dtype(dtype))
            offset += count
        return out


def forward_layout(
    bucket: Bucket,
    pages_per_slot: int,
    groups: int = 1,
    adapters: bool = False,
    recurrent: bool = False,
    heads: bool = False,
    media: MediaShape | None = None,
) -> Layout:
    """What a step is made of on the device, by `decode_rows` and `make_step`, and which rows sample.

    A decode row's token or start of -1 is the slot's on the device: the last one that it sampled, and its length.

    Args:
        groups: attention groups. What comes from page tables has an axis for them in front where there are several.
        adapters: whether requests may have adapters.
        recurrent: whether layers keep states.
        heads: whether a head follows, which hears all tokens. `next_R` is the token behind each piece, -1 where the step samples it
            in `next_slot_R`.
        media: of engines that read images. `media_index_C` says which of the store's rows stands in a chunk token's place, -1 for
            none; `chunk_ahead_C` how many later positions a token attends to, where images' tokens do; `axes_3C` and
            `decode_delta_B` rotate where positions are three numbers. Where all tokens of a sequence attend to one of the store's
            rows, `cross_B` and `cross_R` say to which.
    """
    t, b, c, r = bucket.tokens, bucket.decode, bucket.chunk, bucket.rows
    each = () if groups == 1 else (groups,)
    own = (("adapter_B", (b,), "int32"), ("adapter_R", (r,), "int32")) if adapters else ()
    own += (("chunk_slot_R", (r,), "int32"),) if recurrent else ()
    own += (("next_R", (r,), "int32"), ("next_slot_R", (r,), "int32")) if heads else ()
    lasting = media is not None and media.lasting
    own += (("cross_B", (b,), "int32"), ("cross_R", (r,), "int32")) if lasting else ()
    own += (("media_index_C", (c,), "int32"),) if media is not None and not lasting and c else ()
    own += (("chunk_ahead_C", (c,), "int32"),) if media is not None and media.together and c else ()
    own += (("axes_3C", (3, c), "int32"), ("decode_delta_B", (b,), "int32")) if media is not None and media.axes else ()
    return Layout(
        (
            ("tokens_T", (t,), "int32"),
            ("decode_slot_B", (b,), "int32"),
            ("decode_start_B", (b,), "int32"),
            ("decode_qlen_B", (b,), "int32"),
            ("decode_pages_BP", (*each, b, pages_per_slot), "int32"),
            ("chunk_positions_C", (c,), "int32"),
            ("chunk_index_C", (*each, c), "int32"),
            ("chunk_pages_RP", (*each, r, pages_per_slot), "int32"),
            ("chunk_start_R", (r,), "int32"),
            ("chunk_qlen_R", (r,), "int32"),
            ("chunk_len_R", (r,), "int32"),
            ("chunk_row_N", (c // Q_BLOCK,), "int32"),
            *((("chunk_last_R", (r,), "int32"),) if c and not heads else ()),
            ("sample_row_S", (bucket.samples,), "int32"),
            *own,
        )
    )


def sample_layout(rows: int, drafts: bool = False, adapters: bool = False) -> Layout:
    """Facts of each row that samples. Rows beyond the plan's point at the dummy slot.

    `length_S` is what the slot's length becomes, and so the position of the token that is drawn; -1: one more than it was, and
    as many more as its place says.

    Args:
        drafts: whether some rows may be places of one request, each behind a draft. `place_S` says which one a row is, and
            `draft_S` the draft that follows it, -1 for none.
        adapters: whether requests may have adapters; `adapter_S` are their slots.
    """
    columns = [(f"{c.name}_S", (rows, *c.shape), c.dtype) for c in COLUMNS]
    if drafts:
        columns += [("place_S", (rows,), "int32"), ("draft_S", (rows,), "int32")]
    if adapters:
        columns += [("adapter_S", (rows,), "int32")]
    return Layout((("slot_S", (rows,), "int32"), ("length_S", (rows,), "int32"), *columns, ("masked", (1,), "int32")))


def decode_rows(f: dict[str, jax.Array], ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(tokens_BQ, start_B): what the decode rows compute, and the position of each one's first place.

    Args:
        f: fields of `forward_layout`.
        ends: DeviceState.ends, for what only the device knows.
    """
    last_token, length = ends
    slot_B, start_B = f["decode_slot_B"], f["decode_start_B"]
    B, D = slot_B.shape[0], f["tokens_T"].shape[0] - f["chunk_positions_C"].shape[0]
    tokens_BQ = f["tokens_T"][:D].reshape(B, D // max(B, 1))
    tokens_BQ = jnp.where(tokens_BQ < 0, last_token[slot_B][:, None], tokens_BQ)
    return tokens_BQ, jnp.where(start_B < 0, length[slot_B], start_B)


def make_step(
    f: dict[str, jax.Array],
    tokens_BQ: jax.Array,
    start_B: jax.Array,
    places: tuple[tuple[int, int, int], ...] | None,
    page_size: int,
) -> Step:
    """The step whose decode rows are these: their positions, where in their pages they go, and how long their contexts are.

    Args:
        f: fields of `forward_layout`.
        places: as in KVGroups.
    """
    (B, Q), qlen_B = tokens_BQ.shape, f["decode_qlen_B"]
    place_Q = jnp.arange(Q, dtype=jnp.int32)
    real_BQ = place_Q < qlen_B[:, None]
    position_BQ = jnp.where(real_BQ, start_B[:, None] + place_Q, 0)
    # Of each group of layers, where there are several.
    page_BQ = f["decode_pages_BP"][..., jnp.arange(B)[:, None], position_BQ // page_size]
    index_BQ = jnp.where(real_BQ, page_BQ * page_size + position_BQ % page_size, 0)
    index_D = index_BQ.reshape(*index_BQ.shape[:-2], B * Q)
    attention = AttentionBatch(
        kv_index_T=jnp.concatenate([index_D, f["chunk_index_C"]], axis=-1),
        decode_len_B=jnp.where(qlen_B > 0, start_B + qlen_B, 0),
        decode_qlen_B=qlen_B if Q > 1 else None,
        chunk_ahead_C=f.get("chunk_ahead_C"),
        places=places,
        **{name: f[name] for name in _AS_PACKED},
    )
    tokens_T = jnp.concatenate([tokens_BQ.reshape(-1), f["tokens_T"][B * Q :]])
    recurrent = None
    if "chunk_slot_R" in f:
        recurrent = RecurrentBatch(
            decode_slot_B=f["decode_slot_B"],
            decode_start_B=start_B,
            decode_count_B=qlen_B,
            chunk_slot_R=f["chunk_slot_R"],
            chunk_first_R=f["chunk_start_R"],
            chunk_start_R=f["chunk_len_R"] - f["chunk_qlen_R"],
            chunk_qlen_R=f["chunk_qlen_R"],
            num_tokens=tokens_T.shape[0],
            queries=Q,
            tentative=Q > 1,
        )
    positions_T = jnp.concatenate([position_BQ.reshape(-1), f["chunk_positions_C"]])
    if "axes_3C" in f:
        turned_BQ = position_BQ + f["decode_delta_B"][:, None]
        positions_T = jnp.concatenate([jnp.tile(turned_BQ.reshape(-1), (3, 1)), f["axes_3C"]], axis=1)
    return Step(tokens_T, positions_T, attention, recurrent=recurrent, last_R=f.get("chunk_last_R"))


def cross_of(f: dict[str, jax.Array], store_MW: jax.Array) -> Cross:
    """`Step.cross` of a step."""
    of_row = jnp.concatenate([f["cross_R"], jnp.zeros(1, jnp.int32)])  # padding blocks are of row R
    return Cross(store_MW, f["cross_B"], f["cross_R"], of_row[f["chunk_row_N"]])


def embeddings_of(f: dict[str, jax.Array], store_MD: jax.Array | None) -> Embeddings | None:
    """`Step.embeddings` of a step whose chunk tokens may stand for images; None where none can."""
    if store_MD is None:
        return None
    decoding = f["tokens_T"].shape[0] - f["media_index_C"].shape[0]
    return Embeddings(store_MD, jnp.pad(f["media_index_C"], (decoding, 0), constant_values=-1))


def adapters_of(f: dict[str, jax.Array]) -> jax.Array:
    """`Step.adapter_T` of a step."""
    B, C = f["adapter_B"].shape[0], f["chunk_positions_C"].shape[0]
    queries = (f["tokens_T"].shape[0] - C) // max(B, 1)
    of_row = jnp.concatenate([f["adapter_R"], jnp.zeros(1, jnp.int32)])  # padding blocks are of row R
    return jnp.concatenate([jnp.repeat(f["adapter_B"], queries), jnp.repeat(of_row[f["chunk_row_N"]], Q_BLOCK)])


_AS_PACKED = ("decode_pages_BP", "chunk_pages_RP", "chunk_start_R", "chunk_qlen_R", "chunk_len_R", "chunk_row_N")


def pack_forward(plan: StepPlan, bucket: Bucket, layout: Layout, slots: SlotTable, page_size: int) -> np.ndarray:
    """Host side of `forward_layout`, of a plan for one replica.

    A fresh array each time: the CPU backend may alias a host buffer, not copy it.
    """
    flat = np.zeros(layout.size, np.int32)
    f = layout.views(flat)
    f["decode_slot_B"][:] = slots.per_replica
    f["chunk_row_N"][:] = bucket.rows
    f["sample_row_S"][:] = -1
    for name in {"chunk_slot_R", "next_slot_R"} & f.keys():
        f[name][:] = slots.per_replica
    if "media_index_C" in f:
        f["media_index_C"][:] = -1
    groups, Q, first = len(slots.pages), bucket.queries, bucket.decode_tokens
    index_GC, decode_pages_GBP, chunk_pages_GRP = (
        f[name].reshape(groups, *f[name].shape[-dims:])
        for name, dims in (("chunk_index_C", 1), ("decode_pages_BP", 2), ("chunk_pages_RP", 2))
    )
    n = len(plan.decode)
    if n:
        slot = np.fromiter((r.slot for r in plan.decode), np.int32, n)
        f["tokens_T"][: n * Q : Q] = np.fromiter(
            (r.tokens[p] if p < len(r.tokens) else -1 for r, p in zip(plan.decode, plan.decode_positions, strict=True)),
            np.int32,
            n,
        )
        f["decode_slot_B"][:n] = slots.on_device(slot)
        f["decode_start_B"][:n] = np.where(f["tokens_T"][: n * Q : Q] < 0, -1, plan.decode_positions)
        f["decode_qlen_B"][:n] = 1
        for row, drafts in enumerate(plan.drafts):
            f["tokens_T"][row * Q + 1 : row * Q + 1 + len(drafts)] = drafts
            f["decode_qlen_B"][row] += len(drafts)
        for table, pages in zip(slots.pages, decode_pages_GBP, strict=True):
            np.take(table, slot, axis=0, out=pages[:n], mode="clip")
        if "adapter_B" in f:
            f["adapter_B"][:n] = np.fromiter((r.adapter_slot for r in plan.decode), np.int32, n)
        if "cross_B" in f:
            f["cross_B"][:n] = np.fromiter((_lasting_row(r) for r in plan.decode), np.int32, n)
        if "decode_delta_B" in f:
            f["decode_delta_B"][:n] = np.fromiter(
                (r.spec.media.delta if r.spec.media else 0 for r in plan.decode), np.int32, n
            )
    samples = f["sample_row_S"]
    samples[: n * Q] = np.arange(n * Q)
    row_of_sample = n * Q
    for i, chunk in enumerate(plan.chunks):
        request, length, at = chunk.request, chunk.length, chunk.offset
        position = np.arange(chunk.start, chunk.start + length, dtype=np.int32)
        table_GP = slots.pages[:, request.slot]
        f["tokens_T"][first + at : first + at + length] = request.tokens[chunk.start : chunk.start + length]
        f["chunk_positions_C"][at : at + length] = position
        index_GC[:, at : at + length] = table_GP[:, position // page_size] * page_size + position % page_size
        chunk_pages_GRP[:, i] = table_GP
        f["chunk_start_R"][i] = at
        f["chunk_qlen_R"][i] = length
        f["chunk_len_R"][i] = chunk.start + length
        if "chunk_last_R" in f:
            f["chunk_last_R"][i] = chunk.read
        if "adapter_R" in f:
            f["adapter_R"][i] = request.adapter_slot
        if "chunk_slot_R" in f:
            f["chunk_slot_R"][i] = request.slot % slots.per_replica
        if "next_R" in f:
            f["next_R"][i] = request.tokens[chunk.end] if chunk.end < len(request.tokens) else -1
            f["next_slot_R"][i] = request.slot % slots.per_replica
        if "cross_R" in f:
            f["cross_R"][i] = _lasting_row(request)
        if "media_index_C" in f:
            _pack_media(f, chunk, position)
        f["chunk_row_N"][at // Q_BLOCK : (at + align(length)) // Q_BLOCK] = i
        if chunk.samples:
            samples[row_of_sample] = first + at + length - 1
            row_of_sample += 1
    return flat


def _lasting_row(request: Request) -> int:
    """The store's row that a request's tokens attend to; any, for one without."""
    rows = request.media_rows.get(0)
    return 0 if rows is None else int(rows[0])


def _pack_media(f: dict[str, np.ndarray], chunk: Chunk, position: np.ndarray) -> None:
    """What a piece of a prompt has of images: rows of the store, and positions of three numbers."""
    media, at, end = chunk.request.spec.media, chunk.offset, chunk.offset + chunk.length
    if "axes_3C" in f:
        f["axes_3C"][:, at:end] = position if media is None else media.positions(chunk.start, chunk.end)
    if media is None:
        return
    if "chunk_ahead_C" in f and media.together:
        f["chunk_ahead_C"][at:end] = media.reaches(chunk.start, chunk.end) - position
    for index, item in media.overlapping(chunk.start, chunk.end):
        here = (item.places_N >= chunk.start) & (item.places_N < chunk.end)
        f["media_index_C"][at - chunk.start + item.places_N[here]] = chunk.request.media_rows[index][here]


def pack_image(encoding: Encoding | None, patches: int, shape: MediaShape) -> tuple[np.ndarray, np.ndarray]:
    """(patches_PX, flat) of an image, or of none, for the program of so many patches; see `MediaShape.layout`."""
    layout = shape.layout(patches)
    flat, padded_PX = np.zeros(layout.size, np.int32), np.zeros((patches, shape.patch_dim), np.float32)
    f = layout.views(flat)
    f["rows_N"][:] = shape.rows
    if encoding is not None:
        item, rows = encoding.item, encoding.rows
        f["place_P2"][: len(item.place_P2)] = item.place_P2
        f["count"][:] = len(item.patches_PX)
        f["rows_N"][: len(rows)] = rows
        padded_PX[: len(item.patches_PX)] = item.patches_PX
        if item.pick_NK is not None and item.share_NK is not None:
            f["pick_NK"][: len(rows)], f["share_NK"][: len(rows)] = item.pick_NK, item.share_NK
    return padded_PX, flat


def pack_sample(
    plan: StepPlan, rows: int, layout: Layout, slots: SlotTable, masked: bool, queries: int = 1
) -> np.ndarray:
    """Host side of `sample_layout`, of a plan for one replica.

    Args:
        masked: whether a token mask goes with the step.
        queries: places of each decode row.
    """
    flat = np.zeros(layout.size, np.int32)
    f = layout.views(flat)
    n, d = len(plan.sampled), len(plan.decode)
    owner = sample_owners(n, d, queries)
    slot = np.full(rows, slots.num_slots, np.int32)
    slot[: len(owner)] = np.fromiter((r.slot for r in plan.sampled), np.int32, n)[owner]
    f["slot_S"][:] = slots.on_device(slot)
    ends = [p + 1 if p < len(r.tokens) else -1 for r, p in zip(plan.decode, plan.decode_positions, strict=True)]
    ends += [chunk.end for chunk in plan.chunks if chunk.samples]
    f["length_S"][: len(owner)] = np.array(ends, np.int32)[owner]
    for column in COLUMNS:
        f[f"{column.name}_S"][:] = slots.columns[column.name][slot]
    if "adapter_S" in f:
        f["adapter_S"][: len(owner)] = np.fromiter((r.adapter_slot for r in plan.sampled), np.int32, n)[owner]
    f["masked"][0] = masked
    if "place_S" in f:
        f["draft_S"][:] = -1
        if queries > 1:
            f["place_S"][: d * queries] = np.tile(np.arange(queries, dtype=np.int32), d)
            known = f["length_S"][: d * queries]
            known += np.where(known < 0, 0, f["place_S"][: d * queries])
            for row, drafts in enumerate(plan.drafts):
                f["draft_S"][row * queries : row * queries + len(drafts)] = drafts
    return flat


def forward_behind(flat: np.ndarray, bucket: Bucket, layout: Layout) -> np.ndarray:
    """The decode step behind a packed one, of all replicas end to end: the same rows, one position on, of which only the device
    knows."""
    flat = flat.copy()
    for part in flat.reshape(-1, layout.size):
        f = layout.views(part)
        real_B = f["decode_qlen_B"] > 0
        f["tokens_T"][: bucket.decode][real_B] = -1
        f["decode_start_B"][real_B] = -1
    return flat


def sample_behind(flat: np.ndarray, layout: Layout) -> np.ndarray:
    """The same of what samples."""
    flat = flat.copy()
    for part in flat.reshape(-1, layout.size):
        layout.views(part)["length_S"][:] = -1
    return flat


def sample_owners(sampled: int, decode: int, queries: int) -> np.ndarray:
    """Of each row that samples, which of the plan's sampled requests it belongs to; decode rows have `queries` of them."""
    if queries == 1:
        return np.arange(sampled)
    return np.concatenate([np.repeat(np.arange(decode), queries), np.arange(decode, sampled)])
