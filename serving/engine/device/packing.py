"""A plan as one int32 array a program, so that a step costs one transfer (8 small ones: 280 us; one: 40 us).

The same layout object packs on the host (numpy) and unpacks inside the program (slices at static offsets, floats by bitcast).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops.paged_attention.batch import Q_BLOCK, AttentionBatch
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.chunks import CHUNK_ALIGN, align
from serving.engine.requests.plan import StepPlan
from serving.engine.requests.slots import SlotTable

assert CHUNK_ALIGN == Q_BLOCK, "the scheduler and the kernels must agree on where pieces start"

NO_LOGPROBS = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Named fields with fixed shapes in one flat int32 array."""

    fields: tuple[tuple[str, tuple[int, ...], str], ...]  # name, shape, dtype

    @property
    def size(self) -> int:
        return sum(int(np.prod(shape)) for _, shape, _ in self.fields)

    def views(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Writable views of a flat int32 array."""
        out = {}
        offset = 0
        for name, shape, dtype in self.fields:
            count = int(np.prod(shape))
            out[name] = flat[offset : offset + count].view(dtype).reshape(shape)
            offset += count
        return out

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


def forward_layout(bucket: Bucket, pages_per_slot: int, groups: int = 1) -> Layout:
    """Fields of AttentionBatch, the tokens (-1: take the slot's last sampled one), and which rows sample.

    Args:
        groups: attention groups. What comes from page tables has an axis for them in front where there are several.
    """
    t, b, c, r = bucket.tokens, bucket.decode, bucket.chunk, bucket.rows
    each = () if groups == 1 else (groups,)
    return Layout(
        (
            ("tokens_T", (t,), "int32"),
            ("decode_slot_B", (b,), "int32"),
            ("positions_T", (t,), "int32"),
            ("kv_index_T", (*each, t), "int32"),
            ("decode_pages_BP", (*each, b, pages_per_slot), "int32"),
            ("decode_len_B", (b,), "int32"),
            ("chunk_pages_RP", (*each, r, pages_per_slot), "int32"),
            ("chunk_start_R", (r,), "int32"),
            ("chunk_qlen_R", (r,), "int32"),
            ("chunk_len_R", (r,), "int32"),
            ("chunk_row_N", (c // Q_BLOCK,), "int32"),
            ("sample_row_S", (bucket.samples,), "int32"),
        )
    )


def sample_layout(rows: int) -> Layout:
    """Per-row sampling facts. Rows beyond the plan's point at the dummy slot."""
    return Layout(
        (
            ("slot_S", (rows,), "int32"),
            ("step_S", (rows,), "int32"),
            ("temperature_S", (rows,), "float32"),
            ("top_k_S", (rows,), "int32"),
            ("top_p_S", (rows,), "float32"),
            ("min_p_S", (rows,), "float32"),
            ("seed_S2", (rows, 2), "uint32"),
            ("repetition_S", (rows,), "float32"),
            ("presence_S", (rows,), "float32"),
            ("frequency_S", (rows,), "float32"),
            ("min_tokens_S", (rows,), "int32"),
            ("num_logprobs_S", (rows,), "int32"),
            ("biased_S", (rows,), "int32"),
            ("masked", (1,), "int32"),
        )
    )


def attention_batch(fields: dict[str, Any], places: tuple[tuple[int, int], ...] | None) -> AttentionBatch:
    """The fields of `forward_layout` that a model reads. `places`: as in KVGroups."""
    names = [f.name for f in dataclasses.fields(AttentionBatch) if f.name != "places"]
    return AttentionBatch(**{name: fields[name] for name in names}, places=places)


def pack_forward(plan: StepPlan, bucket: Bucket, layout: Layout, slots: SlotTable, page_size: int) -> np.ndarray:
    """Host side of `forward_layout`, of a plan for one replica.

    A fresh array each time: the CPU backend may alias a host buffer, not copy it.
    """
    flat = np.zeros(layout.size, np.int32)
    f = layout.views(flat)
    f["decode_slot_B"][:] = slots.per_replica
    f["chunk_row_N"][:] = bucket.rows
    groups = len(slots.pages)
    index_GT, decode_pages_GBP, chunk_pages_GRP = (
        f[name].reshape(groups, *f[name].shape[-dims:])
        for name, dims in (("kv_index_T", 1), ("decode_pages_BP", 2), ("chunk_pages_RP", 2))
    )
    n = len(plan.decode)
    if n:
        slot = np.fromiter((r.slot for r in plan.decode), np.int32, n)
        position = np.asarray(plan.decode_positions, np.int32)
        f["tokens_T"][:n] = np.fromiter(
            (r.tokens[p] if p < len(r.tokens) else -1 for r, p in zip(plan.decode, plan.decode_positions, strict=True)),
            np.int32,
            n,
        )
        f["decode_slot_B"][:n] = slots.on_device(slot)
        f["positions_T"][:n] = position
        page, offset = position // page_size, position % page_size
        for table, pages, index in zip(slots.pages, decode_pages_GBP, index_GT, strict=True):
            np.take(table, slot, axis=0, out=pages[:n], mode="clip")
            index[:n] = pages[np.arange(n), page] * page_size + offset
        f["decode_len_B"][:n] = position + 1
    samples = f["sample_row_S"]
    samples[:n] = np.arange(n)
    row_of_sample = n
    start = 0
    for i, chunk in enumerate(plan.chunks):
        request, length = chunk.request, chunk.length
        at = bucket.decode + start
        position = np.arange(chunk.start, chunk.start + length, dtype=np.int32)
        table_GP = slots.pages[:, request.slot]
        f["tokens_T"][at : at + length] = request.tokens[chunk.start : chunk.start + length]
        f["positions_T"][at : at + length] = position
        index_GT[:, at : at + length] = table_GP[:, position // page_size] * page_size + position % page_size
        chunk_pages_GRP[:, i] = table_GP
        f["chunk_start_R"][i] = start
        f["chunk_qlen_R"][i] = length
        f["chunk_len_R"][i] = chunk.start + length
        f["chunk_row_N"][start // Q_BLOCK : (start + align(length)) // Q_BLOCK] = i
        if chunk.samples:
            samples[row_of_sample] = at + length - 1
            row_of_sample += 1
        start += align(length)
    return flat


def pack_sample(
    plan: StepPlan, rows: int, layout: Layout, slots: SlotTable, steps: Sequence[int], masked: bool
) -> np.ndarray:
    """Host side of `sample_layout`, of a plan for one replica.

    Args:
        steps: of each sampled row, how many completion tokens come before the one it samples.
        masked: whether a token mask goes with the step.
    """
    flat = np.zeros(layout.size, np.int32)
    f = layout.views(flat)
    n = len(plan.sampled)
    slot = np.full(rows, slots.num_slots, np.int32)
    slot[:n] = np.fromiter((r.slot for r in plan.sampled), np.int32, n)
    f["slot_S"][:] = slots.on_device(slot)
    f["step_S"][:n] = steps
    for name, source in (
        ("temperature_S", slots.temperature),
        ("top_k_S", slots.top_k),
        ("top_p_S", slots.top_p),
        ("min_p_S", slots.min_p),
        ("seed_S2", slots.seed),
        ("repetition_S", slots.repetition),
        ("presence_S", slots.presence),
        ("frequency_S", slots.frequency),
        ("min_tokens_S", slots.min_tokens),
        ("num_logprobs_S", slots.num_logprobs),
        ("biased_S", slots.biased),
    ):
        f[name][:] = source[slot]
    f["masked"][0] = masked
    return flat
