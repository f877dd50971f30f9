"""Carries plans out: owns weights, pages, device state and compiled programs; packs, dispatches, reads back.

`dispatch_forward` and `dispatch_sample` never wait for the device; `collect` does.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ops import paged_attention
from serving.engine.buckets import Bucket, BucketTable
from serving.engine.chunks import align
from serving.engine.compiling import CompileGuard, Program, ProgramCache, compile_all
from serving.engine.masks import is_constrained
from serving.engine.packing import forward_layout, pack_forward, pack_sample, sample_layout
from serving.engine.page_store import PageStore
from serving.engine.placement import place, placed
from serving.engine.plan import Chunk, StepPlan, StepResult
from serving.engine.programs import (
    PROMPT_LOGPROB_ROWS,
    SampleOutput,
    SplitModel,
    load_slot,
    make_decode_loop,
    make_forward,
    make_prompt_logprobs,
    make_sample,
    pool,
    used_leaves,
)
from serving.engine.request import Request
from serving.engine.sampling_params import SamplingParams
from serving.engine.sizing import Sizes
from serving.engine.slots import SlotTable
from serving.engine.state import DeviceState, needs_loading, slot_rows
from serving.engine.types import EngineRequest, TokenLogprobs


@dataclasses.dataclass(slots=True)
class InFlight:
    """A dispatched step on its way. `output` is None until its sample is dispatched."""

    plan: StepPlan
    bucket: Bucket
    hidden_SD: Any
    sample_flat: np.ndarray
    constrained: tuple[tuple[int, Request], ...]  # (row, request) of rows that need a mask
    prompt_logprobs: list[tuple[Chunk, int, Any]]  # (chunk, offset in it, program output)
    pooled_RD: Any  # row i belongs to chunk i, where that pools; None where none does
    dispatched_at: float = dataclasses.field(default_factory=time.perf_counter)
    output: SampleOutput | None = None
    loop_output: Any = None  # of a dispatch of several decode steps


class ModelRunner:
    """One model on one mesh.

    Args:
        model: an nnx.Module implementing models.api.CausalLM, weights on their devices.
        sizes: resolved sizes.
        cache: where executables are kept.
        attention_backend: force one implementation of paged attention.
        num_scheduler_steps: compile decode loops of up to this many steps, when more than 1.
        host_tier: compile what moves pages to host memory and back.
    """

    def __init__(
        self,
        model: Any,
        sizes: Sizes,
        cache: ProgramCache,
        *,
        mesh: jax.sharding.Mesh | None = None,
        attention_backend: str | None = None,
        host_tier: bool = False,
        num_scheduler_steps: int = 1,
    ) -> None:
        self.sizes = sizes
        self.vocab_size = model.vocab_size
        self.pages_per_slot = -(-sizes.max_model_len // sizes.page_size)
        self.buckets = BucketTable.make(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        self.guard = CompileGuard()
        self._cache = cache
        self._mesh = mesh
        self._backend = attention_backend
        self._split, self._leaves = SplitModel.split(model)
        with paged_attention.use_backend(attention_backend):
            self._kv = tuple(
                paged_attention.allocate(spec, sizes.num_pages, sizes.page_size, jnp.dtype(sizes.kv_dtype), mesh)
                for spec in model.kv_specs()
            )
        self._state = place(mesh, DeviceState.zeros(sizes.max_num_seqs, self.vocab_size))
        self._mask_width = -(-self.vocab_size // 32)
        self._no_mask = {s: place(mesh, jnp.zeros((s, self._mask_width), jnp.int32)) for s in self.buckets.sample_sizes}
        self._forward_layouts = {b: forward_layout(b, self.pages_per_slot) for b in self.buckets.buckets}
        self._sample_layouts = {s: sample_layout(s) for s in self.buckets.sample_sizes}
        self._programs: dict[str, Any] = {}
        self._store = PageStore() if host_tier else None
        self._max_steps = num_scheduler_steps
        self._head: list[int] = []  # which leaves the logits read
        self._hidden: jax.ShapeDtypeStruct  # of one decode row; set by compile

    # ---- start ----

    def compile(self, on_done: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program, runs each once on padding, and arms the guard."""
        with paged_attention.use_backend(self._backend):
            programs = [placed(self._mesh, program) for program in self._all_programs()]
            self._programs = compile_all(programs, self._cache, on_done)
        if self._store is not None:
            self._store.bind(self._programs)
        self._warm_up()
        self.guard.arm()

    def _all_programs(self) -> list[Program]:
        leaves = jax.tree.map(_abstract, self._leaves)
        kv = jax.tree.map(_abstract, self._kv)
        state = jax.tree.map(_abstract, self._state)
        width = self._hidden = self._hidden_width(leaves, kv)
        programs = []
        for bucket, layout in self._forward_layouts.items():
            keep = bucket.chunk > 0
            fn = make_forward(self._split, layout, keep)
            flat = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
            programs.append(Program(f"forward {bucket}", fn, (leaves, kv, state.last_token, flat), donate=(1,)))
            if self._max_steps > 1 and not bucket.chunk:
                sample = self._sample_layouts[bucket.samples]
                fn = make_decode_loop(self._split, layout, sample, self.sizes.page_size, self._max_steps)
                args = (
                    leaves,
                    kv,
                    state,
                    flat,
                    jax.ShapeDtypeStruct((sample.size,), jnp.int32),
                    jax.ShapeDtypeStruct((), jnp.int32),
                )
                programs.append(Program(f"decode_loop {bucket.decode}", fn, args, donate=(1, 2)))
        hidden_head = jax.ShapeDtypeStruct((PROMPT_LOGPROB_ROWS, width.shape[-1]), width.dtype)
        self._head = used_leaves(lambda leaves, h: self._split.merge(leaves).logits(h), leaves, hidden_head)
        head_leaves = tuple(leaves[i] for i in self._head)
        for size, layout in self._sample_layouts.items():
            fn = self._with_head(make_sample(self._split, layout))
            args = (
                head_leaves,
                state,
                jax.ShapeDtypeStruct((size, width.shape[-1]), width.dtype),
                jax.ShapeDtypeStruct((layout.size,), jnp.int32),
                jax.ShapeDtypeStruct((size, self._mask_width), jnp.int32),
            )
            programs.append(Program(f"sample {size}", fn, args, donate=(1,)))
        rows = jax.ShapeDtypeStruct((PROMPT_LOGPROB_ROWS,), jnp.int32)
        for tokens in self.buckets.chunk_sizes:
            hidden = jax.ShapeDtypeStruct((tokens, width.shape[-1]), width.dtype)
            fn = self._with_head(make_prompt_logprobs(self._split))
            programs.append(Program(f"prompt_logprobs {tokens}", fn, (head_leaves, hidden, rows, rows)))
            weights = jax.ShapeDtypeStruct((self.buckets.max_rows, tokens), jnp.float32)
            programs.append(Program(f"pool {tokens}", pool, (hidden, weights)))
        scalar = jax.ShapeDtypeStruct((), jnp.int32)
        slot = [
            jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
            for a in (state.seen, state.bias_ids, state.bias_values, state.banned_ids)
        ]
        if self._store is not None:
            programs += self._store.programs(kv)
        programs.append(Program("load_slot", load_slot, (state, scalar, *slot), donate=(0,)))
        # Longest first: with two workers a large program compiled last would be waited for alone.
        return sorted(programs, key=lambda p: -sum(a.size for a in jax.tree.leaves(p.args[-1])))

    def _with_head(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """`fn` over the leaves that logits read, the others absent."""

        def with_head(head: tuple[Any, ...], *rest: Any) -> Any:
            leaves: list[Any] = [None] * len(self._leaves)
            for i, leaf in zip(self._head, head, strict=True):
                leaves[i] = leaf
            return fn(tuple(leaves), *rest)

        return with_head

    def _hidden_width(self, leaves: Any, kv: Any) -> jax.ShapeDtypeStruct:
        bucket = self.buckets.buckets[0]
        layout = self._forward_layouts[bucket]
        last = jax.ShapeDtypeStruct((self.sizes.max_num_seqs + 1,), jnp.int32)
        flat = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        return jax.eval_shape(make_forward(self._split, layout, False), leaves, kv, last, flat)[1]

    def _warm_up(self) -> None:
        """Runs every program once, so that the first request is as fast as the tenth (first calls allocate and page in)."""
        slots = SlotTable(self.sizes.max_num_seqs, self.pages_per_slot)
        empty = StepPlan(0, (), (), (), (), ())
        for bucket in self.buckets.buckets:
            step = self._run(empty, bucket, slots)
            self.dispatch_sample(step, None)
            self.collect(step)
            if f"decode_loop {bucket.decode}" in self._programs and not bucket.chunk:
                self.collect(self._run(dataclasses.replace(empty, num_steps=2), bucket, slots))
        for tokens in self.buckets.chunk_sizes:
            hidden = place(self._mesh, jnp.zeros((tokens, self._hidden.shape[-1]), self._hidden.dtype))
            rows = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
            self._programs[f"prompt_logprobs {tokens}"](self._head_leaves, hidden, rows, rows)
            self._programs[f"pool {tokens}"](hidden, np.zeros((self.buckets.max_rows, tokens), np.float32))
        if self._store is not None:
            self._store.spill(self._kv, ((0, b""),))
            self._kv = self._store.restore(self._kv, ((0, b""),))
            self._store.settle()
            self._store.drop((b"",))
        dummy = slot_rows_neutral(self.vocab_size)
        self._state = self._programs["load_slot"](self._state, np.int32(self.sizes.max_num_seqs), *dummy)
        jax.block_until_ready(self._state)

    # ---- a step ----

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> InFlight:
        """Starts the forward part of a step and prepares its sampling."""
        if self._store is not None:
            if plan.spilled:
                self._store.spill(self._kv, plan.spilled)
            if plan.restored:
                self._kv = self._store.restore(self._kv, plan.restored)
            self._store.drop(plan.dropped)
        for request in plan.admitted:
            if needs_loading(request, self._max_steps > 1):
                rows = slot_rows(request, self.vocab_size, self._max_steps > 1)
                self._state = self._programs["load_slot"](self._state, np.int32(request.slot), *rows)
        chunk_tokens = sum(align(c.length) for c in plan.chunks)
        bucket = self.buckets.find(len(plan.decode), chunk_tokens, len(plan.chunks))
        return self._run(plan, bucket, slots)

    def _run(self, plan: StepPlan, bucket: Bucket, slots: SlotTable) -> InFlight:
        flat = pack_forward(plan, bucket, self._forward_layouts[bucket], slots, self.sizes.page_size)
        if plan.num_steps > 1:
            return self._run_loop(plan, bucket, slots, flat)
        program = self._programs[f"forward {bucket}"]
        self._kv, hidden_SD, hidden_TD = program(self._leaves, self._kv, self._state.last_token, flat)
        steps = [r.total_len - r.prompt_len - 1 for r in plan.sampled]
        constrained = tuple((row, r) for row, r in enumerate(plan.sampled) if is_constrained(r))
        sample_flat = pack_sample(
            plan, bucket.samples, self._sample_layouts[bucket.samples], slots, steps, bool(constrained)
        )
        asked = [
            part
            for chunk in plan.chunks
            if chunk.request.spec.params.prompt_logprobs is not None
            for part in self._dispatch_prompt_logprobs(plan, bucket, chunk, hidden_TD)
        ]
        pooled = self._dispatch_pool(plan, bucket, hidden_TD)
        return InFlight(plan, bucket, hidden_SD, sample_flat, constrained, asked, pooled)

    def _run_loop(self, plan: StepPlan, bucket: Bucket, slots: SlotTable, flat: np.ndarray) -> InFlight:
        """Starts several decode steps at once; sampling is part of it."""
        steps = [r.total_len - r.prompt_len - plan.num_steps for r in plan.sampled]
        sample_flat = pack_sample(plan, bucket.samples, self._sample_layouts[bucket.samples], slots, steps, False)
        self._kv, self._state, out = self._programs[f"decode_loop {bucket.decode}"](
            self._leaves, self._kv, self._state, flat, sample_flat, np.int32(plan.num_steps)
        )
        out.copy_to_host_async()
        return InFlight(plan, bucket, None, sample_flat, (), [], None, loop_output=out)

    def _dispatch_pool(self, plan: StepPlan, bucket: Bucket, hidden_TD: Any) -> Any:
        """Pools the chunks that ask for it, one row of the result a chunk; None where nobody does."""
        if not any(c.request.spec.pooling for c in plan.chunks):
            return None
        weights = np.zeros((self.buckets.max_rows, bucket.tokens), np.float32)
        at = bucket.decode
        for row, chunk in enumerate(plan.chunks):
            end = at + chunk.length
            if chunk.request.spec.pooling == "mean":
                weights[row, at:end] = 1.0
            elif chunk.request.spec.pooling and chunk.start + chunk.length == chunk.request.prompt_len:
                weights[row, end - 1] = 1.0
            at += align(chunk.length)
        return self._programs[f"pool {bucket.tokens}"](hidden_TD, weights)

    def _dispatch_prompt_logprobs(
        self, plan: StepPlan, bucket: Bucket, chunk: Chunk, hidden_TD: Any
    ) -> list[tuple[Chunk, int, Any]]:
        """Scores the chunk's positions against the prompt tokens that follow them, PROMPT_LOGPROB_ROWS at a time."""
        request = chunk.request
        first = bucket.decode
        for other in plan.chunks:
            if other is chunk:
                break
            first += align(other.length)
        targets = request.tokens[chunk.start + 1 : min(chunk.start + chunk.length + 1, request.prompt_len)]
        parts = []
        for offset in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            piece = targets[offset : offset + PROMPT_LOGPROB_ROWS]
            rows = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
            ids = np.zeros(PROMPT_LOGPROB_ROWS, np.int32)
            rows[: len(piece)] = np.arange(first + offset, first + offset + len(piece))
            ids[: len(piece)] = piece
            program = self._programs[f"prompt_logprobs {bucket.tokens}"]
            parts.append((chunk, offset, program(self._head_leaves, hidden_TD, rows, ids)))
        return parts

    @functools.cached_property
    def _head_leaves(self) -> tuple[Any, ...]:
        return tuple(self._leaves[i] for i in self._head)

    def dispatch_sample(self, step: InFlight, mask_SW: np.ndarray | None) -> None:
        """Starts the sampling part, unless the step has done it itself.

        Args:
            mask_SW: int32 [bucket.samples, ceil(V/32)] where `step.constrained` is not empty.
        """
        if step.loop_output is not None:
            return
        size = step.bucket.samples
        mask = self._no_mask[size] if mask_SW is None else mask_SW
        program = self._programs[f"sample {size}"]
        self._state, output = program(self._head_leaves, self._state, step.hidden_SD, step.sample_flat, mask)
        output.tokens_finite.copy_to_host_async()
        step.output = output

    def new_mask(self, step: InFlight) -> np.ndarray:
        """A mask that allows everything, for the step's rows."""
        return np.full((step.bucket.samples, self._mask_width), -1, np.int32)

    def collect(self, step: InFlight) -> StepResult:
        """Waits for a step and reads what was asked for."""
        if step.loop_output is not None:
            rows, steps = len(step.plan.sampled), step.plan.num_steps
            tokens, finite = np.asarray(step.loop_output)[:, :steps, :rows]
            return StepResult(tokens, finite != 0)
        assert step.output is not None, "the step's sample was not dispatched"
        tokens, finite = np.asarray(step.output.tokens_finite)
        rows = len(step.plan.sampled)
        logprobs = None
        if any(r.spec.params.logprobs is not None for r in step.plan.sampled):
            logprobs = self._read_logprobs(step)
        if self._store is not None:
            self._store.settle()
        pooled = None
        if step.pooled_RD is not None:
            sums = np.asarray(step.pooled_RD)
            chunks = enumerate(step.plan.chunks)
            pooled = {c.request.request_id: sums[i] for i, c in chunks if c.request.spec.pooling}
        return StepResult(tokens[:rows], finite[:rows] > 0, logprobs, self._read_prompt_logprobs(step), pooled)

    def _read_logprobs(self, step: InFlight) -> list[TokenLogprobs | None]:
        out = step.output
        assert out is not None
        tokens = np.asarray(out.tokens_finite)[0]
        host = [np.asarray(a) for a in (out.logprob_S, out.rank_S, out.top_ids_SN, out.top_values_SN)]
        entries: list[TokenLogprobs | None] = []
        for row, request in enumerate(step.plan.sampled):
            count = request.spec.params.logprobs
            entries.append(None if count is None else _entry(int(tokens[row]), count, row, *host))
        return entries

    def _read_prompt_logprobs(self, step: InFlight) -> dict[str, list[TokenLogprobs]] | None:
        if not step.prompt_logprobs:
            return None
        found: dict[str, list[TokenLogprobs]] = {}
        for chunk, offset, output in step.prompt_logprobs:
            request = chunk.request
            host = [np.asarray(a) for a in output]
            first = chunk.start + 1 + offset
            last = min(first + PROMPT_LOGPROB_ROWS, chunk.start + chunk.length + 1, request.prompt_len)
            count = request.spec.params.prompt_logprobs or 0
            found.setdefault(request.request_id, []).extend(
                _entry(request.tokens[position], count, row, *host) for row, position in enumerate(range(first, last))
            )
        return found

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._leaves))

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._leaves))


def slot_rows_neutral(vocab_size: int) -> tuple[np.ndarray, ...]:
    """Rows of a request that asks for nothing."""
    return slot_rows(Request(EngineRequest("", (0,), SamplingParams()), 0), vocab_size)


def _entry(
    token: int, count: int, row: int, logprob: np.ndarray, rank: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> TokenLogprobs:
    top = tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
    return TokenLogprobs(token, float(logprob[row]), int(rank[row]), top)


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
