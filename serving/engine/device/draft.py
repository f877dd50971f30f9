"""A draft model beside the decoder: its weights, its pages, and the programs that guess with it.

Its pages are the decoder's: where a sequence has page p, p holds its tokens' K and V for the draft's layers too, in arrays of the
draft's own. So whatever shares, moves, preempts or frees a page does it for both, and a prefix that is found is one for both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ops import paged_attention
from ops.paged_attention.groups import KVGroups
from serving.engine.device.components import Component
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.drafting import make_draft, make_put_drafts
from serving.engine.device.programs.keys import DRAFT, ProgramKey
from serving.engine.device.programs.packing import Layout, forward_layout, pack_forward, pack_sample, sample_layout
from serving.engine.device.programs.placement import of_one
from serving.engine.device.programs.program_list import StepShapes
from serving.engine.device.programs.steps import make_forward
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.commands import CatchUp, Draft
from serving.engine.requests.plan import Chunk, StepPlan
from serving.engine.requests.slots import SlotTable

FORWARD, SAMPLE = "to compute", "to verify"
"""Variants of `put_drafts`: for a step's tokens, and for what its places are held against."""


class DraftModel:
    """One draft model, on the decoder's mesh.

    Args:
        model: an nnx.Module implementing models.api.CausalLM, weights on their devices.
        shapes: of the decoder's steps.

    Attributes:
        component: its weights.
        kv: its pages; taken over by each of its programs.
        drafts: int32 [rows, K], of the last `draft`.
    """

    def __init__(self, model: Any, shapes: StepShapes, mesh: Mesh | None, component: Component | None = None) -> None:
        self.component = component or Component(DRAFT, model)
        self.kv: Any = None
        self.drafts: Any = None
        self._groups = KVGroups.of(model.kv_specs(), None)
        self._shapes, self._mesh = shapes, mesh
        self._programs: dict[ProgramKey, Any] = {}

    hears = False
    """Whether it is a head."""

    def reset(self) -> None:
        """Empty pages."""
        sizes = self._shapes.sizes
        self.kv = tuple(
            paged_attention.allocate(spec, sizes.num_pages, sizes.page_size, jnp.dtype(sizes.kv_dtype), self._mesh)
            for spec in self._groups.arrays
        )

    def layouts(self, bucket: Bucket) -> tuple[Layout, Layout]:
        """How `draft`'s arguments for a step with drafts are packed: rows of two places, and what their draws read."""
        return forward_layout(_first(bucket), self._shapes.pages_per_slot), sample_layout(bucket.decode)

    def command(self, plans: Sequence[StepPlan], bucket: Bucket, slots: SlotTable) -> Draft:
        """What guesses for a step with drafts, whose parts by replica are given."""
        forward, sample = self.layouts(bucket)
        packed: list[tuple[np.ndarray, ...]] = []
        for plan in plans:
            two = last_two(plan)
            wanted = np.zeros(bucket.decode, np.int32)
            wanted[: len(plan.drafts)] = np.fromiter(map(len, plan.drafts), np.int32, len(plan.drafts))
            packed.append(
                (
                    pack_forward(two, _first(bucket), forward, slots, self._shapes.sizes.page_size),
                    pack_sample(two, bucket.decode, sample, slots, False),
                    wanted,
                )
            )
        return Draft(bucket, *(np.concatenate(parts) for parts in zip(*packed, strict=True)))

    def programs(self, ends: Any) -> list[Program]:
        """All of them, for one replica.

        Args:
            ends: ShapeDtypeStructs of DeviceState.ends.
        """
        split, leaves, page_size = (
            self.component.split,
            self.component.abstract_leaves,
            self._shapes.sizes.page_size,
        )
        kv = jax.tree.map(lambda array: of_one(self._mesh, array), self.kv)

        def ints(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.int32)

        found: list[Program] = []
        for bucket, layout in self._shapes.forward_layouts.items():
            if bucket.chunk:
                fn = make_forward(split, self._groups, layout, page_size, False)
                args = (leaves, kv, ends, ints(layout.size))
                found.append(Program(key("forward", bucket), fn, args, (1,), (0,), True))
            elif bucket.queries > 1:
                forward, sample = self.layouts(bucket)
                drafts = bucket.queries - 1
                fn = make_draft(split, self._groups, forward, sample, page_size, drafts)
                args = (leaves, kv, ints(forward.size), ints(sample.size), ints(bucket.decode))
                found.append(Program(key("draft", bucket), fn, args, (1,), (0,), True))
                found += self._put_drafts(bucket, layout)
        return found

    def _put_drafts(self, bucket: Bucket, layout: Layout) -> list[Program]:
        """What writes guesses into the arguments of a step."""
        drafts = jax.ShapeDtypeStruct((bucket.decode, bucket.queries - 1), jnp.int32)
        verified = self._shapes.sample_layouts[bucket.samples]
        found: list[Program] = []
        for which, to, field, shift in ((FORWARD, layout, "tokens_T", 1), (SAMPLE, verified, "draft_S", 0)):
            put = make_put_drafts(to, field, bucket.queries, shift)
            args = (jax.ShapeDtypeStruct((to.size,), jnp.int32), drafts)
            found.append(Program(key("put_drafts", bucket, which), put, args, (), (), True))
        return found

    def bind(self, programs: dict[ProgramKey, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def missed(self, plan: StepPlan, bucket: Bucket) -> tuple[Chunk, ...]:
        """What is to be computed before a step of one replica, in pieces.

        Args:
            bucket: the step's.
        """
        return plan.caught_up

    def pack_missed(self, plan: StepPlan, bucket: Bucket, slots: SlotTable) -> np.ndarray:
        """`CatchUp.packed` of one replica, whose plan has what was missed for chunks, and nothing else."""
        layout = self._shapes.forward_layouts[bucket]
        return pack_forward(plan, bucket, layout, slots, self._shapes.sizes.page_size)

    def heard(self, bucket: Bucket, packed: Any, ends: Any, heard_TH: Any) -> None:
        """The decoder has computed a step. Computes the same in one with chunks, so that the draft's pages hold it too.

        Args:
            ends: DeviceState.ends before it.
            heard_TH: what heads are given.
        """
        if bucket.chunk:
            self.kv, *_ = self._programs[key("forward", bucket)](self.component.leaves, self.kv, ends, packed)

    def sampled(self, ends: Any) -> None:
        """The step has been sampled; `ends` are those behind it."""

    def catch_up(self, command: CatchUp, ends: Any) -> None:
        """Computes pieces of sequences that were computed without it."""
        program = self._programs[key("forward", command.bucket)]
        self.kv, *_ = program(self.component.leaves, self.kv, ends, command.packed)

    def draft(self, command: Draft) -> None:
        """Guesses for the rows of a step; `put` writes them into its arguments."""
        program = self._programs[key("draft", command.bucket)]
        self.kv, self.drafts = program(
            self.component.leaves, self.kv, command.forward, command.sample, command.wanted, *self._besides
        )

    @property
    def _besides(self) -> tuple[Any, ...]:
        """What guesses are made of besides weights, pages and tokens."""
        return ()

    def put(self, which: str, bucket: Bucket, packed: np.ndarray) -> Any:
        """A step's packed argument with the drafts in it."""
        return self._programs[key("put_drafts", bucket, which)](packed, self.drafts)

    def sleep(self, keep_weights: bool) -> Sequence[Any]:
        """Gives its weights' memory back; returns its pages, which the caller deletes."""
        self.component.sleep(keep_weights)
        pages, self.kv, self.drafts = self.kv, None, None
        return pages


def last_two(plan: StepPlan) -> StepPlan:
    """The step's decode rows, each with the last two tokens that its request has; one, where it has no more."""
    second = [position > 0 for position in plan.decode_positions]
    rows = list(zip(plan.decode, plan.decode_positions, second, strict=True))
    return dataclasses.replace(
        plan,
        decode_positions=tuple(position - two for _, position, two in rows),
        drafts=tuple((request.tokens[position],) if two else () for request, position, two in rows),
        chunks=(),
        sampled=plan.decode,
    )


def _first(bucket: Bucket) -> Bucket:
    """The first pass of `draft` for a step of this bucket."""
    return Bucket(bucket.decode, 0, 0, 2)


def key(kind: Any, bucket: Bucket, variant: str = "") -> ProgramKey:
    """Of one of a draft's programs."""
    return ProgramKey(kind, bucket, variant, DRAFT)
