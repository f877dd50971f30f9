"""A head beside the decoder: as a draft model, but that it reads the decoder's hidden states, table and output projection.

Where a draft model computes what the decoder computes, whenever it likes, a head is given hidden states when they are made. So
those of each slot's last positions are kept (programs/hearing.py), and the host has it catch up before they are written over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from serving.engine.device.components import Beside, Component
from serving.engine.device.draft import DraftModel, key
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.drafting import make_draft
from serving.engine.device.programs.hearing import make_catch_up, make_follow, make_hear
from serving.engine.device.programs.keys import DRAFT
from serving.engine.device.programs.packing import Layout, forward_layout, pack_forward, pack_sample, sample_layout
from serving.engine.device.programs.placement import BY_REPLICA, EVERYWHERE, num_replicas, of_one, place
from serving.engine.device.programs.program_list import StepShapes
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.chunks import align
from serving.engine.requests.commands import CatchUp, Draft
from serving.engine.requests.plan import HEARD, Chunk, StepPlan
from serving.engine.requests.slots import SlotTable


class HeadModel(DraftModel):
    """One head, on the decoder's mesh.

    Args:
        head: models.heads.Head, its weights on their devices and the decoder's shared.
        decoder: whose leaves it reads.

    Attributes:
        recent: of each slot the hidden states at its last positions, [slots + 1, HEARD, H], by replica.
    """

    def __init__(self, head: Any, shapes: StepShapes, mesh: Mesh | None, decoder: Component) -> None:
        super().__init__(head, shapes, mesh, Beside(DRAFT, head, decoder))
        self.recent: Any = None
        self._width, self._dtype = head.heard_dim, head.compute_dtype
        self._unsampled: tuple[Bucket, Any, Any] | None = None  # a step with chunks between its halves

    hears = True

    def reset(self) -> None:
        super().reset()
        replicas = num_replicas(self._mesh)
        rows = replicas * (self._shapes.sizes.max_num_seqs + 1)
        spec = BY_REPLICA if replicas > 1 else EVERYWHERE
        self.recent = place(self._mesh, jnp.zeros((rows, HEARD, self._width), self._dtype), spec)
        self._unsampled = None

    def layouts(self, bucket: Bucket) -> tuple[Layout, Layout]:
        """Rows of as many places as are verified at once: so many tokens may be new since the last guesses."""
        return forward_layout(bucket, self._shapes.pages_per_slot), sample_layout(bucket.decode)

    def command(self, plans: Sequence[StepPlan], bucket: Bucket, slots: SlotTable) -> Draft:
        forward, sample = self.layouts(bucket)
        packed: list[tuple[np.ndarray, ...]] = []
        for plan in plans:
            starts = {c.request.request_id: max(c.start, c.end - bucket.queries) for c in plan.caught_up}
            # Rows without guesses have a place too, whose result nobody reads; it is at no position of anybody's.
            rows = dataclasses.replace(plan, chunks=(), drafts=(), sampled=plan.decode, caught_up=())
            flat = pack_forward(rows, bucket, forward, slots, self._shapes.sizes.page_size)
            f = forward.views(flat)
            Q = bucket.queries
            for row, request in enumerate(plan.decode):
                start = starts.get(request.request_id, 0)
                tokens = request.tokens[start + 1 :] if plan.has_drafted(row) else []
                f["tokens_T"][row * Q : row * Q + Q] = 0
                f["tokens_T"][row * Q : row * Q + len(tokens)] = tokens
                f["decode_start_B"][row], f["decode_qlen_B"][row] = start, len(tokens)
            wanted = np.zeros(bucket.decode, np.int32)
            wanted[: len(plan.drafts)] = [
                len(drafts) if plan.has_drafted(row) else 0 for row, drafts in enumerate(plan.drafts)
            ]
            packed.append((flat, pack_sample(rows, bucket.decode, sample, slots, False), wanted))
        return Draft(bucket, *(np.concatenate(parts) for parts in zip(*packed, strict=True)))

    def missed(self, plan: StepPlan, bucket: Bucket) -> tuple[Chunk, ...]:
        """What rows with guesses have missed beyond what their first pass takes, and all that the others have."""
        guessing = {r.request_id for row, r in enumerate(plan.decode) if plan.has_drafted(row)}
        found: list[Chunk] = []
        at = 0
        for chunk in plan.caught_up:
            own = bucket.queries if chunk.request.request_id in guessing else 0
            if chunk.length > own:
                found.append(dataclasses.replace(chunk, length=chunk.length - own, offset=at))
                at += align(found[-1].length)
        return tuple(found)

    def pack_missed(self, plan: StepPlan, bucket: Bucket, slots: SlotTable) -> np.ndarray:
        layout = self._shapes.forward_layouts[bucket]
        flat = pack_forward(plan, bucket, layout, slots, self._shapes.sizes.page_size)
        tokens = layout.views(flat)["tokens_T"]
        for chunk in plan.chunks:  # each stands at the position before its own
            tokens[chunk.offset : chunk.offset + chunk.length] = chunk.request.tokens[chunk.start + 1 : chunk.end + 1]
        return flat

    def programs(self, ends: Any) -> list[Program]:
        split, leaves, page_size = (
            self.component.split,
            self.component.abstract_leaves,
            self._shapes.sizes.page_size,
        )
        kv = jax.tree.map(lambda array: of_one(self._mesh, array), self.kv)
        recent = of_one(self._mesh, self.recent)

        def ints(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.int32)

        found: list[Program] = []
        for bucket, layout in self._shapes.forward_layouts.items():
            flat = ints(layout.size)
            heard = jax.ShapeDtypeStruct((bucket.tokens, self._width), self._dtype)
            if bucket.chunk:
                fn = make_follow(split, self._groups, layout, page_size)
                args = (leaves, kv, recent, ends, flat, heard)
                found.append(Program(key("forward", bucket), fn, args, (1, 2), (0,), True))
                if not bucket.decode:
                    fn = make_catch_up(split, self._groups, layout, page_size)
                    found.append(Program(key("catch_up", bucket), fn, (leaves, kv, recent, flat), (1,), (0,), True))
                continue
            found.append(Program(key("hear", bucket), make_hear(layout), (recent, ends, flat, heard), (0,), (), True))
            if bucket.queries > 1:
                forward, sample = self.layouts(bucket)
                fn = make_draft(split, self._groups, forward, sample, page_size, bucket.queries - 1, hears=True)
                args = (leaves, kv, ints(forward.size), ints(sample.size), ints(bucket.decode), recent)
                found.append(Program(key("draft", bucket), fn, args, (1,), (0,), True))
                found += self._put_drafts(bucket, layout)
        return found

    def heard(self, bucket: Bucket, packed: Any, ends: Any, heard_TH: Any) -> None:
        if bucket.chunk:
            self._unsampled = bucket, packed, heard_TH
        else:
            self.recent = self._programs[key("hear", bucket)](self.recent, ends, packed, heard_TH)

    def sampled(self, ends: Any) -> None:
        if self._unsampled is not None:
            (bucket, packed, heard_TH), self._unsampled = self._unsampled, None
            self.kv, self.recent = self._programs[key("forward", bucket)](
                self.component.leaves, self.kv, self.recent, ends, packed, heard_TH
            )

    def catch_up(self, command: CatchUp, ends: Any) -> None:
        program = self._programs[key("catch_up", command.bucket)]
        self.kv = program(self.component.leaves, self.kv, self.recent, command.packed)

    @property
    def _besides(self) -> tuple[Any, ...]:
        return (self.recent,)

    def sleep(self, keep_weights: bool) -> Sequence[Any]:
        pages, recent = super().sleep(keep_weights), self.recent
        self.recent = None
        return [*pages, recent]
