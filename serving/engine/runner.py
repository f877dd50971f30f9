"""Plans to commands, and what devices sampled to results: packs, dispatches, reads back.

`dispatch_forward` and `dispatch_sample` never wait for the device; `collect` does.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from serving.engine.buckets import Bucket
from serving.engine.chunks import align
from serving.engine.commands import DecodeLoop, Forward, LoadSlot, Pool, PromptLogprobs, Sample
from serving.engine.executor import Executor
from serving.engine.masks import is_constrained
from serving.engine.packing import pack_forward, pack_sample
from serving.engine.plan import Chunk, StepPlan, StepResult
from serving.engine.programs import PROMPT_LOGPROB_ROWS, SampleOutput
from serving.engine.request import Request
from serving.engine.slots import SlotTable
from serving.engine.state import needs_loading, slot_rows
from serving.engine.types import TokenLogprobs


@dataclasses.dataclass(slots=True)
class InFlight:
    """A dispatched step on its way. `output` is None until its sampling is dispatched."""

    plan: StepPlan
    bucket: Bucket
    sample_flat: np.ndarray
    constrained: tuple[tuple[int, Request], ...]  # (row, request) of rows that need a mask
    prompt_logprobs: list[tuple[Chunk, int, Any]]  # (chunk, offset in it, program output)
    pooled_RD: Any  # row i belongs to chunk i, where that pools; None where none does
    dispatched_at: float = dataclasses.field(default_factory=time.perf_counter)
    output: SampleOutput | None = None
    loop_output: Any = None  # of a dispatch of several decode steps
    number: int = 0  # of its sampling, counted from 1
    expert_loads: Any = None  # int32 [layers, E]; None where the model has no experts


class ModelRunner:
    """The scheduler's side of an executor.

    Attributes:
        expert_loads: int64 [layers with experts, E]: tokens that visited each expert since the start, those of dispatches of
            several steps aside; None for models without experts. Never changed in place.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.buckets = executor.buckets
        self.guard = executor.guard
        self.expert_loads: np.ndarray | None = None

    # ---- a step ----

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> InFlight:
        """Starts the forward part of a step and prepares its sampling."""
        executor = self.executor
        if executor.store is not None:
            if plan.spilled:
                executor.spill(plan.spilled)
            if plan.restored:
                executor.restore(plan.restored)
            executor.store.drop(plan.dropped)
        stops = executor.max_steps > 1
        for request in plan.admitted:
            if needs_loading(request, stops):
                executor.execute(LoadSlot(request.slot, *slot_rows(request, executor.vocab_size, stops)))
        chunk_tokens = sum(align(c.length) for c in plan.chunks)
        bucket = self.buckets.find(len(plan.decode), chunk_tokens, len(plan.chunks))
        return self._run(plan, bucket, slots)

    def _run(self, plan: StepPlan, bucket: Bucket, slots: SlotTable) -> InFlight:
        executor = self.executor
        flat = pack_forward(plan, bucket, executor.forward_layouts[bucket], slots, executor.sizes.page_size)
        if plan.num_steps > 1:
            return self._run_loop(plan, bucket, slots, flat)
        expert_loads = executor.execute(Forward(bucket, flat))
        if expert_loads is not None:
            expert_loads.copy_to_host_async()
        steps = [r.total_len - r.prompt_len - 1 for r in plan.sampled]
        constrained = tuple((row, r) for row, r in enumerate(plan.sampled) if is_constrained(r))
        layout = executor.sample_layouts[bucket.samples]
        sample_flat = pack_sample(plan, bucket.samples, layout, slots, steps, bool(constrained))
        asked = [
            part
            for chunk in plan.chunks
            if chunk.request.spec.params.prompt_logprobs is not None
            for part in self._dispatch_prompt_logprobs(plan, bucket, chunk)
        ]
        pooled = self._dispatch_pool(plan, bucket)
        return InFlight(plan, bucket, sample_flat, constrained, asked, pooled, expert_loads=expert_loads)

    def _run_loop(self, plan: StepPlan, bucket: Bucket, slots: SlotTable, flat: np.ndarray) -> InFlight:
        """Starts several decode steps at once; sampling is part of it."""
        steps = [r.total_len - r.prompt_len - plan.num_steps for r in plan.sampled]
        layout = self.executor.sample_layouts[bucket.samples]
        sample_flat = pack_sample(plan, bucket.samples, layout, slots, steps, False)
        out = self.executor.execute(DecodeLoop(bucket, flat, sample_flat, plan.num_steps))
        out.copy_to_host_async()
        return InFlight(plan, bucket, sample_flat, (), [], None, loop_output=out, number=self.executor.num_sampled)

    def _dispatch_pool(self, plan: StepPlan, bucket: Bucket) -> Any:
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
        return self.executor.execute(Pool(weights))

    def _dispatch_prompt_logprobs(self, plan: StepPlan, bucket: Bucket, chunk: Chunk) -> list[tuple[Chunk, int, Any]]:
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
            parts.append((chunk, offset, self.executor.execute(PromptLogprobs(bucket.tokens, rows, ids))))
        return parts

    def dispatch_sample(self, step: InFlight, mask_SW: np.ndarray | None) -> None:
        """Starts the sampling part of the step dispatched last, unless the step has done it itself.

        Args:
            mask_SW: int32 [bucket.samples, ceil(V/32)] where `step.constrained` is not empty.
        """
        if step.loop_output is not None:
            return
        output = self.executor.execute(Sample(step.bucket.samples, step.sample_flat, mask_SW))
        output.tokens_finite.copy_to_host_async()
        step.output, step.number = output, self.executor.num_sampled

    def new_mask(self, step: InFlight) -> np.ndarray:
        """A mask that allows everything, for the step's rows."""
        return np.full((step.bucket.samples, self.executor.mask_width), -1, np.int32)

    def collect(self, step: InFlight) -> StepResult:
        """Waits for a step and reads what was asked for."""
        if step.loop_output is not None:
            found = np.asarray(step.loop_output)
            self.executor.sampled(step.number, found)
            rows, steps = len(step.plan.sampled), step.plan.num_steps
            tokens, finite = found[:, :steps, :rows]
            return StepResult(tokens, finite != 0)
        assert step.output is not None, "the step's sample was not dispatched"
        found = np.asarray(step.output.tokens_finite)
        self.executor.sampled(step.number, found)
        tokens, finite = found
        rows = len(step.plan.sampled)
        logprobs = None
        if any(r.spec.params.logprobs is not None for r in step.plan.sampled):
            logprobs = self._read_logprobs(step)
        if self.executor.store is not None:
            self.executor.store.settle()
        if step.expert_loads is not None:
            loads = np.asarray(step.expert_loads).astype(np.int64)
            self.expert_loads = loads if self.expert_loads is None else self.expert_loads + loads
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


def _entry(
    token: int, count: int, row: int, logprob: np.ndarray, rank: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> TokenLogprobs:
    top = tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
    return TokenLogprobs(token, float(logprob[row]), int(rank[row]), top)
