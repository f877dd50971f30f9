"""Every program of an engine: its name, its function, and the shapes and places of its arguments. Nothing is allocated.

The executor compiles them for the devices it has, `serving.plan` for devices that are not there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from models.api import CausalLM
from ops.paged_attention.groups import KVGroups
from ops.recurrent import States
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.packing import Layout, MediaShape, forward_layout, sample_layout
from serving.engine.device.programs.steps import (
    PROMPT_LOGPROB_ROWS,
    SplitModel,
    load_slot,
    make_decode_loop,
    make_forward,
    make_prompt_logprobs,
    make_sample,
    pool,
    used_leaves,
)
from serving.engine.device.programs.trial import make_commit
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.cache_specs import recurrent_of
from serving.engine.requests.sizes import Sizes


@dataclasses.dataclass(frozen=True)
class StepShapes:
    """The shapes of an engine's steps, from its sizes alone.

    Attributes:
        pages_per_slot: columns of a page table.
        mask_width: int32 words of a row of a grammar's mask.
        groups: which layers share pages.
        forward_layouts, sample_layouts: how a step's packed arguments lie, by bucket and by number of sampled rows.
        taps: of a head that hears the model, `models.heads.Head.taps`; None where there is none.
        media: how images are read; None where none are.
    """

    sizes: Sizes
    vocab_size: int
    buckets: BucketTable
    pages_per_slot: int
    mask_width: int
    groups: KVGroups
    forward_layouts: dict[Bucket, Layout]
    sample_layouts: dict[int, Layout]
    taps: tuple[int, ...] | None = None
    media: MediaShape | None = None

    @classmethod
    def of(
        cls,
        sizes: Sizes,
        model: CausalLM,
        adapters: bool = False,
        taps: tuple[int, ...] | None = None,
        media: MediaShape | None = None,
    ) -> StepShapes:
        """The shapes for a model and these sizes; with adapters, and images, where requests may have some, with a head's taps."""
        vocab_size, groups = model.vocab_size, KVGroups.of(model.kv_specs(), sizes.layers_per_page)
        recurrent = recurrent_of(model) is not None
        buckets = BucketTable.make(
            sizes.max_num_seqs,
            sizes.max_num_batched_tokens,
            draft_tokens=sizes.draft_tokens,
            draft_places=sizes.draft_places,
        )
        pages_per_slot = -(-sizes.max_model_len // sizes.page_size)
        return cls(
            sizes,
            vocab_size,
            buckets,
            pages_per_slot,
            -(-vocab_size // 32),
            groups,
            {
                b: forward_layout(b, pages_per_slot, len(groups.windows), adapters, recurrent, taps is not None, media)
                for b in buckets.buckets
            },
            {s: sample_layout(s, sizes.draft_tokens > 0, adapters) for s in buckets.sample_sizes},
            taps,
            media,
        )

    def make_forward(self, split: SplitModel, bucket: Bucket) -> Callable[..., Any]:
        """`steps.make_forward` of a model for a bucket."""
        keep = bucket.chunk > 0 or self.taps == ()
        return make_forward(
            split, self.groups, self.forward_layouts[bucket], self.sizes.page_size, keep, self.taps or ()
        )

    def forward_args(self, bucket: Bucket) -> tuple[jax.ShapeDtypeStruct, ...]:
        """What a forward program is given behind weights, cache and ends: the packed step, and embeddings of images."""
        flat = jax.ShapeDtypeStruct((self.forward_layouts[bucket].size,), jnp.int32)
        if self.media is None or not self.media.read_in(bucket):
            return (flat,)
        return flat, self.media.store


@dataclasses.dataclass(frozen=True)
class ProgramList:
    """What `list_programs` found.

    Attributes:
        programs: largest first: with two workers a large program compiled last would be waited for alone.
        head: which of the leaves the logits read; programs that make logits get these only.
    """

    programs: list[Program]
    head: list[int]


def list_programs(
    split: SplitModel,
    leaves: tuple[Any, ...],
    kv: tuple[Any, ...],
    state: Any,
    shapes: StepShapes,
    max_steps: int = 1,
    more: Sequence[Program] = (),
) -> ProgramList:
    """Names the programs.

    Args:
        leaves, kv, state: ShapeDtypeStructs of the weights, and of one replica's cache and device state, placed.
        max_steps: list decode loops of up to this many steps, when more than 1.
        more: programs of the caller's, to be sorted in.
    """
    width = hidden_width(split, leaves, kv, shapes)

    def ints(*dims: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, jnp.int32)

    def hidden(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, width.shape[-1]), width.dtype)

    programs = list(more)
    for bucket, layout in shapes.forward_layouts.items():
        fn = shapes.make_forward(split, bucket)
        given = shapes.forward_args(bucket)
        programs.append(Program(ProgramKey("forward", bucket), fn, (leaves, kv, state.ends, *given), (1,), (0,), True))
        if bucket.queries > 1 and isinstance(kv[-1], States):
            trial = jax.eval_shape(fn, leaves, kv, state.ends, *given)[1].trial
            args = (kv[-1], state.ends, given[0], trial)
            programs.append(Program(ProgramKey("commit_states", bucket), make_commit(layout), args, (0,), (), True))
        if max_steps > 1 and not bucket.chunk and bucket.queries == 1:
            sample = shapes.sample_layouts[bucket.samples]
            fn = make_decode_loop(split, shapes.groups, layout, sample, shapes.sizes.page_size, max_steps)
            args = (leaves, kv, state, ints(layout.size), ints(sample.size), ints())
            programs.append(Program(ProgramKey("decode_loop", bucket), fn, args, (1, 2), (0, 5)))
    head = used_leaves(lambda leaves, h: split.merge(leaves).logits(h), leaves, hidden(PROMPT_LOGPROB_ROWS))
    head_leaves = tuple(leaves[i] for i in head)
    with_head = with_leaves(head, len(leaves))
    for size, layout in shapes.sample_layouts.items():
        args = (head_leaves, state, hidden(size), ints(layout.size), ints(size, shapes.mask_width))
        fn = with_head(make_sample(split, layout, shapes.sizes.draft_tokens))
        programs.append(Program(ProgramKey("sample", size), fn, args, (1,), (0,)))
    rows = ints(PROMPT_LOGPROB_ROWS)
    for tokens in shapes.buckets.chunk_sizes:
        fn = with_head(make_prompt_logprobs(split))
        programs.append(
            Program(ProgramKey("prompt_logprobs", tokens), fn, (head_leaves, hidden(tokens), rows, rows), shared=(0,))
        )
        weights = jax.ShapeDtypeStruct((shapes.buckets.max_rows, tokens), jnp.float32)
        programs.append(Program(ProgramKey("pool", tokens), pool, (hidden(tokens), weights), shared=()))
    slot = [
        jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
        for a in (state.seen, state.bias_ids, state.bias_values, state.banned_ids)
    ]
    programs.append(Program(ProgramKey("load_slot"), load_slot, (state, ints(1), *slot), (0,), (2, 3, 4, 5), True))
    return ProgramList(sorted(programs, key=_size, reverse=True), head)


def _size(program: Program) -> int:
    return sum(math.prod(a.shape) for a in jax.tree.leaves(program.args[3:4] or program.args[-1:]))


def with_leaves(head: list[int], num_leaves: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of all leaves one of those that logits read, the others absent."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        def with_head(head_leaves: tuple[Any, ...], *rest: Any) -> Any:
            leaves: list[Any] = [None] * num_leaves
            for i, leaf in zip(head, head_leaves, strict=True):
                leaves[i] = leaf
            return fn(tuple(leaves), *rest)

        return with_head

    return wrap


def hidden_width(split: SplitModel, leaves: Any, kv: Any, shapes: StepShapes) -> jax.ShapeDtypeStruct:
    """Hidden states of one decode row or more."""
    layout = shapes.forward_layouts[shapes.buckets.buckets[0]]
    of_slots = jax.ShapeDtypeStruct((shapes.sizes.max_num_seqs + 1,), jnp.int32)
    flat = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    forward = make_forward(split, shapes.groups, layout, shapes.sizes.page_size, False)
    return jax.eval_shape(forward, leaves, kv, (of_slots, of_slots), flat)[1].hidden_SD
