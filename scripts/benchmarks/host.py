"""Host work a step at many running requests: scheduling, packing, reading and streaming, with a device that only takes time."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import statistics
import time
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import show
from models.embedding_head import EmbeddingHead
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineInfo, EngineRequest
from serving.engine.device.programs.packing import forward_layout, pack_forward, pack_sample, sample_layout
from serving.engine.engine import Engine
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.plan import StepPlan, StepResult
from serving.engine.requests.slots import SlotTable
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--running", type=int, default=256, help="requests running at once")
    parser.add_argument("--steps", type=int, default=300, help="tokens of each request")
    parser.add_argument("--step-ms", type=float, default=10.0, help="what the device takes a step")
    parser.add_argument("--max-model-len", type=int, default=4096)


@dataclasses.dataclass
class FakeStep:
    """A dispatched step: the real packing has been done, nothing computes."""

    plan: StepPlan
    bucket: Bucket
    end: float = 0.0
    dispatched_at: float = 0.0
    constrained: tuple[()] = ()


class FakeRunner:
    """What the engine loop calls of a StepRunner, with a device that is busy for a fixed time a step.

    Attributes:
        host: seconds from one wait for the device to the next.
        work: of those, seconds that the engine thread had a core.
        idle: seconds that the device waited for the next step.
    """

    def __init__(self, buckets: BucketTable, pages_per_slot: int, page_size: int, step_s: float) -> None:
        self.guard = types.SimpleNamespace(count=0, close=lambda: None)
        self.expert_loads = None
        self.media_time_s = 0.0
        self.executor = types.SimpleNamespace(alone=True)
        self.adapters = types.SimpleNamespace(open=False)
        self.host: list[float] = []
        self.work: list[float] = []
        self.idle: list[float] = []
        self._buckets = buckets
        self._page_size = page_size
        self._step_s = step_s
        self._forward = {b: forward_layout(b, pages_per_slot) for b in buckets.buckets}
        self._sample = {s: sample_layout(s) for s in buckets.sample_sizes}
        self._free = 0.0
        self._woke = self._woke_cpu = 0.0

    def dispatch_forward(self, plan: StepPlan, slots: SlotTable) -> FakeStep:
        bucket = self._buckets.find(len(plan.decode), plan.chunk_tokens, len(plan.chunks))
        pack_forward(plan, bucket, self._forward[bucket], slots, self._page_size)
        pack_sample(plan, bucket.samples, self._sample[bucket.samples], slots, False)
        return FakeStep(plan, bucket, dispatched_at=time.perf_counter())

    def dispatch_sample(self, step: FakeStep, mask: Any) -> None:
        now = time.perf_counter()
        if self._free:
            self.idle.append(max(0.0, now - self._free))
        self._free = step.end = max(now, self._free) + self._step_s

    def collect(self, step: FakeStep) -> StepResult:
        now = time.perf_counter()
        if self._woke:
            self.host.append(now - self._woke)
            self.work.append(time.thread_time() - self._woke_cpu)
        time.sleep(max(0.0, step.end - now))
        self._woke, self._woke_cpu = time.perf_counter(), time.thread_time()
        rows = len(step.plan.sampled)
        return StepResult(np.full((rows, 1), 7, np.int32), np.ones((rows, 1), bool))


def fake_engine(running: int, max_model_len: int, step_s: float, asynchronous: bool) -> tuple[Engine, FakeRunner]:
    """A real engine, scheduler, thread and client around a FakeRunner."""
    page_size, budget = 16, running + 1024
    table = BucketTable.make(running, budget)
    num_pages = running * -(-max_model_len // page_size) + 1
    runner = FakeRunner(table, -(-max_model_len // page_size), page_size, step_s)
    scheduler = Scheduler(
        SchedulerConfig(running, budget, table.max_chunk, table.max_rows, max_model_len, page_size, num_pages)
    )
    info = EngineInfo(
        "fake", "none", 50_000, max_model_len, running, budget, page_size, num_pages, "none", None, "", "", "0"
    )
    loaded = types.SimpleNamespace(source=None, generation_config={}, embedding=EmbeddingHead(("last",)))
    return Engine(EngineConfig(async_scheduling=asynchronous), loaded, runner, scheduler, info), runner


async def _consume(engine: Engine, requests: Sequence[EngineRequest]) -> None:
    async def one(request: EngineRequest) -> None:
        async for _ in engine.client.generate(request):
            pass

    await asyncio.gather(*map(one, requests))


def measure(running: int, steps: int, step_s: float, max_model_len: int, asynchronous: bool) -> dict[str, Any]:
    """Runs `running` requests of `steps` tokens to their end."""
    engine, runner = fake_engine(running, max_model_len, step_s, asynchronous)
    engine.loop.start()
    params = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    requests = [EngineRequest(str(i), tuple(range(i, i + 32)), params) for i in range(running)]
    cpu, wall = time.process_time(), time.perf_counter()
    asyncio.run(_consume(engine, requests))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    engine.shutdown()
    warm = len(runner.host) // 5  # the first steps are prefill
    idle = list(itertools.islice(runner.idle, warm, None))
    return {
        "asynchronous": asynchronous,
        "running": running,
        "step_ms": step_s * 1e3,
        "host_cpu_ms_median": round(1e3 * statistics.median(runner.work[warm:]), 3),
        "host_ms_median": round(1e3 * statistics.median(runner.host[warm:]), 3),
        "host_ms_p95": round(1e3 * float(np.percentile(runner.host[warm:], 95)), 3),
        "process_cpu_ms_a_step": round(1e3 * cpu / len(runner.host), 3),
        "device_idle_share": round(sum(idle) / (sum(idle) + len(idle) * step_s), 4),
        "seconds": round(wall, 2),
    }


def run(args: argparse.Namespace) -> None:
    for asynchronous in (True, False):
        result = measure(args.running, args.steps, args.step_ms / 1e3, args.max_model_len, asynchronous)
        show({"scenario": "host"} | result, args.json)
