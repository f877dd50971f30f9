"""Plans to commands, and what devices sampled to results: packs, dispatches, reads back.

`dispatch_forward` and `dispatch_sample` never wait for the device; `collect` does.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from serving.engine.api.types import TokenLogprobs
from serving.engine.device.executor import Executor
from serving.engine.device.programs.packing import forward_behind, pack_forward, pack_sample, sample_behind
from serving.engine.device.programs.placement import on_this_process
from serving.engine.device.programs.state import needs_loading, slot_rows
from serving.engine.device.programs.steps import PROMPT_LOGPROB_ROWS, SampleOutput
from serving.engine.device.stores.adapter_store import AdapterStore
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.commands import (
    CatchUp,
    ClearStates,
    DecodeLoop,
    Forward,
    LoadAdapter,
    LoadSlot,
    LoadStates,
    PagesDropped,
    PagesIn,
    PagesOut,
    Pool,
    PromptLogprobs,
    Sample,
    SaveStates,
)
from serving.engine.requests.plan import Chunk, StepPlan, StepResult
from serving.engine.requests.request import Request
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.masks import is_constrained


@dataclasses.dataclass(slots=True)
class InFlight:
    """A dispatched step on its way. `output` is None until its sampling is dispatched.

    Attributes:
        parts: the plan's parts by replica, as it was dispatched: a request may be in another one by the time it is read.
        rows: of each sampled request, its (first) row in what the device samples: replicas are there end to end.
        places: of each, how many rows it has: its own and one for each draft.
        constrained: (row, request) of rows that need a mask.
        prompt_logprobs: (chunk, offset in it, its replica, program output).
        pooled_RD: program output, or None where nobody pools; row i of a replica belongs to its i-th chunk.
        number: of its sampling, counted from 1.
        expert_loads: int32 [layers, E] of each replica; None where the model has no experts.
        drafted: it verifies what a draft model guessed.
        each: of several decode steps dispatched one by one: number of the sampling, tokens and loads of each.
    """

    plan: StepPlan
    parts: Sequence[StepPlan]
    bucket: Bucket
    rows: np.ndarray
    places: np.ndarray
    sample_flat: np.ndarray
    constrained: tuple[tuple[int, Request], ...]
    prompt_logprobs: list[tuple[Chunk, int, int, Any]]
    pooled_RD: Any
    dispatched_at: float = dataclasses.field(default_factory=time.perf_counter)
    output: SampleOutput | None = None
    loop_output: Any = None  # of a dispatch of several decode steps
    number: int = 0
    expert_loads: Any = None
    drafted: bool = False
    each: list[tuple[int, Any, Any]] = dataclasses.field(default_factory=list[tuple[int, Any, Any]])


class StepRunner:
    """The scheduler's side of an executor.

    Attributes:
        expert_loads: int64 [layers with experts, E]: tokens that visited each expert since the start, but not those of replicas on
            other processes; None for models without experts. Never changed in place.
    """

    def __init__(self, executor: Executor, max_cpu_loras: int = 16) -> None:
        self.executor = executor
        self.buckets = executor.buckets
        self.guard = executor.guard
        self.expert_loads: np.ndarray | None = None
        self._far = jax.default_backend() != "cpu"
        self.adapters = AdapterStore(None if executor.adapters is None else executor.adapters.room, max_cpu_loras)

    # ---- a step ----

    def _fetch(self, *results: Any) -> None:
        """Starts copies to the host, where that is elsewhere (on a CPU it would be 0.07 ms a step for nothing)."""
        if self._far:
            for result in results:
                result.copy_to_host_async()

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> InFlight:
        """Starts the forward part of a step and prepares its sampling."""
        executor = self.executor
        moves = plan.moves
        if moves.pages_out:
            executor.execute(PagesOut.of(moves.pages_out))
        if moves.pages_in:
            executor.execute(PagesIn.of(moves.pages_in))
        if moves.pages_dropped:
            executor.execute(PagesDropped.of(moves.pages_dropped))
        if moves.states_cleared:
            executor.execute(ClearStates.of(moves.states_cleared))
        if moves.states_loaded:
            executor.execute(LoadStates.of(moves.states_loaded))
        if moves.encodings:
            assert executor.tower is not None, "images are taken where something reads them"
            for command in executor.tower.commands(moves.encodings):
                executor.execute(command)
        for slot, digest in plan.adapters:
            executor.execute(LoadAdapter(slot, self.adapters.packed(digest)))
        stops = executor.max_steps > 1
        for request in plan.admitted:
            if needs_loading(request, stops):
                rows = slot_rows(request, executor.vocab_size, stops)
                executor.execute(LoadSlot(request.replica, request.slot % slots.per_replica, *rows))
        plans = self._split(plan)
        bucket = self.buckets.find(
            max(len(p.decode) for p in plans),
            max(p.chunk_tokens for p in plans),
            max(len(p.chunks) for p in plans),
            plan.queries,
        )
        step = self._run(plan, plans, bucket, slots)
        if moves.states_saved:
            executor.execute(SaveStates.of(moves.states_saved))
        return step

    def _split(self, plan: StepPlan) -> Sequence[StepPlan]:
        """Each replica's part of the plan."""
        count = self.executor.replicas
        return (plan,) if count == 1 else [plan.of_replica(replica) for replica in range(count)]

    def _run(self, plan: StepPlan, plans: Sequence[StepPlan], bucket: Bucket, slots: SlotTable) -> InFlight:
        executor = self.executor
        layout, page_size = executor.forward_layouts[bucket], executor.sizes.page_size
        flat = _end_to_end([pack_forward(part, bucket, layout, slots, page_size) for part in plans])
        rows = _rows(plan, plans, bucket)
        constrained = tuple((int(row), r) for row, r in zip(rows, plan.sampled, strict=True) if is_constrained(r))
        sample_layout = executor.sample_layouts[bucket.samples]
        sample_flat = _end_to_end(
            [
                pack_sample(part, bucket.samples, sample_layout, slots, bool(constrained), bucket.queries)
                for part in plans
            ]
        )
        places = np.ones(len(rows), np.int64)
        places[: len(plan.drafts)] += np.fromiter(map(len, plan.drafts), np.int64, len(plan.drafts))
        if plan.num_steps > 1:
            step = InFlight(plan, plans, bucket, rows, places, sample_flat, (), [], None)
            run = self._run_in_loop if executor.max_steps > 1 else self._run_one_by_one
            run(step, flat)
            return step
        drafted = self._have_drafted(plan, plans, bucket, slots)
        expert_loads = executor.execute(Forward(bucket, flat, any(r.adapter_slot for r in plan.requests), drafted))
        if expert_loads is not None:
            self._fetch(expert_loads)
        asked = [
            piece
            for part in plans
            for chunk in part.chunks
            if chunk.request.spec.params.prompt_logprobs is not None
            for piece in self._dispatch_prompt_logprobs(bucket, chunk)
        ]
        pooled = self._dispatch_pool(plans, bucket)
        return InFlight(
            plan,
            plans,
            bucket,
            rows,
            places,
            sample_flat,
            constrained,
            asked,
            pooled,
            expert_loads=expert_loads,
            drafted=drafted,
        )

    def _run_in_loop(self, step: InFlight, flat: np.ndarray) -> None:
        """Several decode steps as one program."""
        out = self.executor.execute(DecodeLoop(step.bucket, flat, step.sample_flat, step.plan.num_steps))
        self._fetch(out.tokens_finite)
        step.loop_output, step.number = out.tokens_finite, self.executor.num_sampled
        step.expert_loads = out.loads[0] if out.loads else None

    def _run_one_by_one(self, step: InFlight, flat: np.ndarray) -> None:
        """Several decode steps by the programs of one, so that none are compiled for them. Those behind the first take up where
        the slots are."""
        executor, bucket = self.executor, step.bucket
        sample_flat = step.sample_flat
        for _ in range(step.plan.num_steps):
            loads = executor.execute(Forward(bucket, flat, False))
            output = executor.execute(Sample(bucket.samples, sample_flat, None))
            self._fetch(output.tokens_finite, *(() if loads is None else (loads,)))
            step.each.append((executor.num_sampled, output.tokens_finite, loads))
            if len(step.each) == 1:
                flat = forward_behind(flat, bucket, executor.forward_layouts[bucket])
                sample_flat = sample_behind(sample_flat, executor.sample_layouts[bucket.samples])

    def _have_drafted(self, plan: StepPlan, plans: Sequence[StepPlan], bucket: Bucket, slots: SlotTable) -> bool:
        """Has the draft model compute what it has missed, and guess where the step verifies that."""
        draft = self.executor.draft
        if draft is None:
            return False
        missed = [
            dataclasses.replace(p, decode=(), decode_positions=(), drafts=(), chunks=draft.missed(p, bucket))
            for p in plans
            if plan.caught_up
        ]
        if any(p.chunks for p in missed):
            shape = self.buckets.find(0, max(p.chunk_tokens for p in missed), max(len(p.chunks) for p in missed))
            flat = _end_to_end([draft.pack_missed(part, shape, slots) for part in missed])
            self.executor.execute(CatchUp(shape, flat))
        if not any(map(plan.has_drafted, range(len(plan.drafts)))):
            return False
        self.executor.execute(draft.command(plans, bucket, slots))
        return True

    def _dispatch_pool(self, plans: Sequence[StepPlan], bucket: Bucket) -> Any:
        """Pools the chunks that ask for it, one row of the result a chunk; None where nobody does."""
        if not any(c.request.spec.pooling for part in plans for c in part.chunks):
            return None
        parts = []
        for part in plans:
            weights = np.zeros((self.buckets.max_rows, bucket.tokens), np.float32)
            for row, chunk in enumerate(part.chunks):
                at = bucket.decode_tokens + chunk.offset
                end = at + chunk.length
                if chunk.request.spec.pooling == "mean":
                    weights[row, at:end] = 1.0
                elif chunk.request.spec.pooling and chunk.end == chunk.request.prompt_len:
                    weights[row, end - 1] = 1.0
            parts.append(weights)
        return self.executor.execute(Pool(_end_to_end(parts)))

    def _dispatch_prompt_logprobs(self, bucket: Bucket, chunk: Chunk) -> list[tuple[Chunk, int, int, Any]]:
        """Scores the chunk's positions against the prompt tokens that follow them, PROMPT_LOGPROB_ROWS at a time."""
        request, first = chunk.request, bucket.decode_tokens + chunk.offset
        targets = request.tokens[chunk.start + 1 : min(chunk.end + 1, request.prompt_len)]
        parts = []
        for offset in range(0, len(targets), PROMPT_LOGPROB_ROWS):
            piece = targets[offset : offset + PROMPT_LOGPROB_ROWS]
            rows = np.zeros((self.executor.replicas, PROMPT_LOGPROB_ROWS), np.int32)
            ids = np.zeros_like(rows)
            rows[request.replica, : len(piece)] = np.arange(first + offset, first + offset + len(piece))
            ids[request.replica, : len(piece)] = piece
            own = np.full(rows.size, request.adapter_slot, np.int32) if self._is_late(request) else None
            command = PromptLogprobs(bucket.tokens, rows.reshape(-1), ids.reshape(-1), own)
            parts.append((chunk, offset, request.replica, self.executor.execute(command)))
        return parts

    def guesses(self, step: InFlight) -> np.ndarray:
        """int32 [decode rows, K]: what the draft model has guessed for the step; waits for that."""
        draft, bucket = self.executor.draft, step.bucket
        assert draft is not None, "nobody guesses"
        replica_R, row_R = np.divmod(step.rows[: len(step.plan.decode)], bucket.samples)
        return np.asarray(draft.drafts)[replica_R * bucket.decode + row_R // bucket.queries]

    def dispatch_sample(self, step: InFlight, mask_SW: np.ndarray | None) -> None:
        """Starts the sampling part of the step dispatched last, unless the step has done it itself.

        Args:
            mask_SW: from `new_mask`, where `step.constrained` is not empty.
        """
        if step.plan.num_steps > 1:
            return
        drafted = step.bucket if step.drafted else None
        adapted = any(map(self._is_late, step.plan.sampled))
        output = self.executor.execute(Sample(step.bucket.samples, step.sample_flat, mask_SW, drafted, adapted))
        self._fetch(output.tokens_finite)
        step.output, step.number = output, self.executor.num_sampled

    def _is_late(self, request: Request) -> bool:
        """Whether a request has an adapter that changes logits."""
        return request.adapter_slot > 0 and self.adapters.is_late(request.spec.adapter or "")

    def new_mask(self, step: InFlight) -> np.ndarray:
        """int32 [rows, ceil(V / 32)] that allows everything, for the step's rows."""
        return np.full((self.executor.replicas * step.bucket.samples, self.executor.mask_width), -1, np.int32)

    def collect(self, step: InFlight) -> StepResult:
        """Waits for a step and reads what was asked for."""
        if step.expert_loads is not None:
            self._count(step.expert_loads)
        if step.loop_output is not None:
            found = np.asarray(step.loop_output)
            self.executor.sampled(step.number, found)
            # [2, steps, B] of each replica; a row of `rows` counts S of each, and B may be less.
            samples, steps = step.bucket.samples, step.plan.num_steps
            found = found.reshape(self.executor.replicas, 2, *found.shape[1:])
            tokens, finite = np.moveaxis(found[step.rows // samples, :, :steps, step.rows % samples], 1, 0)
            return StepResult(tokens, finite != 0)
        if step.each:
            return self._collect_each(step)
        assert step.output is not None, "the step's sample was not dispatched"
        found = np.asarray(step.output.tokens_finite)
        self.executor.sampled(step.number, found)
        tokens, finite = self._by_place(step, found)
        logprobs = None
        if any(r.spec.params.logprobs is not None for r in step.plan.sampled):
            logprobs = self._read_logprobs(step, tokens)
        pooled = None
        if step.pooled_RD is not None:
            sums = np.asarray(step.pooled_RD)
            pooled = {
                c.request.request_id: sums[replica * self.buckets.max_rows + i]
                for replica, part in enumerate(step.parts)
                for i, c in enumerate(part.chunks)
                if c.request.spec.pooling
            }
        return StepResult(tokens, finite > 0, logprobs, self._read_prompt_logprobs(step), pooled)

    def _collect_each(self, step: InFlight) -> StepResult:
        """What steps that were dispatched one by one have sampled."""
        tokens, finite = [], []
        np.asarray(step.each[-1][1])  # waits once: a wake-up for each step would take the cores that compute them
        for number, tokens_finite, loads in step.each:
            found = np.asarray(tokens_finite)
            self.executor.sampled(number, found)
            if loads is not None:
                self._count(loads)
            rows = self._by_row(found)[:, step.rows]
            tokens.append(rows[0])
            finite.append(rows[1] != 0)
        return StepResult(np.stack(tokens, 1), np.stack(finite, 1))

    @property
    def media_time_s(self) -> float:
        """Seconds that images and sounds took to encode so far."""
        tower = getattr(self.executor, "tower", None)
        return 0.0 if tower is None else tower.clock.seconds

    def _count(self, found: Any) -> None:
        """Adds a step's int32 [layers, E] of each replica to `expert_loads`."""
        layers = found.shape[0] // self.executor.replicas
        loads = on_this_process(found).astype(np.int64).reshape(-1, layers, found.shape[-1]).sum(axis=0)
        self.expert_loads = loads if self.expert_loads is None else self.expert_loads + loads

    def _by_row(self, found: np.ndarray) -> np.ndarray:
        """[2, S] of each replica, end to end along the first axis, as [2, all rows]."""
        replicas = self.executor.replicas
        return found if replicas == 1 else found.reshape(replicas, 2, -1).swapaxes(0, 1).reshape(2, -1)

    def _by_place(self, step: InFlight, found: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, finite), [sampled requests, places], of what the device sampled; -1 where a request has fewer places."""
        found = self._by_row(found)
        if not step.plan.drafts:
            return found[0, step.rows, None], found[1, step.rows, None]
        place_N, places = np.arange(step.plan.queries), step.places[:, None]
        rows = step.rows[:, None] + np.minimum(place_N, places - 1)
        return np.where(place_N < places, found[0, rows], -1), found[1, rows]

    def _read_logprobs(self, step: InFlight, tokens: np.ndarray) -> list[Sequence[TokenLogprobs] | None]:
        out = step.output
        assert out is not None
        host = [np.asarray(a) for a in (out.logprob_S, out.rank_S, out.top_ids_SN, out.top_values_SN)]
        entries: list[Sequence[TokenLogprobs] | None] = []
        for row, found, request in zip(step.rows.tolist(), tokens.tolist(), step.plan.sampled, strict=True):
            count = request.spec.params.logprobs
            given = [token for token in found if token >= 0]
            entries.append(
                None if count is None else [_entry(token, count, row + i, *host) for i, token in enumerate(given)]
            )
        return entries

    def _read_prompt_logprobs(self, step: InFlight) -> dict[str, list[TokenLogprobs]] | None:
        if not step.prompt_logprobs:
            return None
        found: dict[str, list[TokenLogprobs]] = {}
        for chunk, offset, replica, output in step.prompt_logprobs:
            request = chunk.request
            host = [np.asarray(a) for a in output]
            base = replica * PROMPT_LOGPROB_ROWS
            first = chunk.start + 1 + offset
            last = min(first + PROMPT_LOGPROB_ROWS, chunk.end + 1, request.prompt_len)
            count = request.spec.params.prompt_logprobs or 0
            found.setdefault(request.request_id, []).extend(
                _entry(request.tokens[position], count, base + row, *host)
                for row, position in enumerate(range(first, last))
            )
        return found


def _rows(plan: StepPlan, plans: Sequence[StepPlan], bucket: Bucket) -> np.ndarray:
    """Of each sampled request of `plan`, its first row in what all replicas sample, int64."""
    if len(plans) == 1:
        return _first_rows(plan, bucket)
    row_of = {
        r.request_id: replica * bucket.samples + row
        for replica, part in enumerate(plans)
        for row, r in zip(_first_rows(part, bucket).tolist(), part.sampled, strict=True)
    }
    return np.array([row_of[r.request_id] for r in plan.sampled], np.int64)


def _first_rows(plan: StepPlan, bucket: Bucket) -> np.ndarray:
    """Of each sampled request of a replica, its first row there: decode rows have a row for each place."""
    row = np.arange(len(plan.sampled))
    return row + np.minimum(row, len(plan.decode)) * (bucket.queries - 1)


def _end_to_end(parts: Sequence[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _entry(
    token: int, count: int, row: int, logprob: np.ndarray, rank: np.ndarray, ids: np.ndarray, values: np.ndarray
) -> TokenLogprobs:
    top = tuple(zip(ids[row, :count].tolist(), values[row, :count].tolist(), strict=True))
    return TokenLogprobs(token, float(logprob[row]), int(rank[row]), top)
