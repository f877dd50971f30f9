"""An engine in this process, driven without a network, and a recorder of its steps."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from benchmarks.driving import drive
from serving.boot import startup
from serving.engine.api.config import DTYPES, KV_CACHE_DTYPES, QUANTIZATIONS, EngineConfig
from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.engine import Engine
from serving.simulator.cost import StepRecord, StepShape
from serving.simulator.simulate import Outcome
from serving.simulator.trace import TraceRequest
from serving.text.grammar import GrammarCompiler

_names = itertools.count()


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The engine's settings that a benchmark may want to change. Defaults are the server's."""
    group = parser.add_argument_group("engine")
    group.add_argument("--model", help="as for serving.launch (default: the default model)")
    group.add_argument("--dtype", default="auto", choices=DTYPES)
    group.add_argument("--quantization", default="auto", choices=QUANTIZATIONS)
    group.add_argument("--kv-cache-dtype", default="auto", choices=KV_CACHE_DTYPES)
    group.add_argument("--max-model-len", type=int)
    group.add_argument("--max-num-seqs", type=int)
    group.add_argument("--max-num-batched-tokens", type=int)
    group.add_argument("--kv-cache-memory", type=int)
    group.add_argument("--mesh", default="data=1,model=1")
    group.add_argument("--cpu-devices", type=int)
    group.add_argument("--compile-cache")


def engine_config(args: argparse.Namespace, **changes: Any) -> EngineConfig:
    """The configuration that the arguments ask for."""
    known = {f.name for f in dataclasses.fields(EngineConfig)}
    given = {k: v for k, v in vars(args).items() if k in known}
    return EngineConfig(**(given | {"progress": False} | changes))


class Local:
    """A started engine. Each call runs its own event loop, as a program without one would."""

    def __init__(self, engine: Engine, startup_s: float = 0.0, grammars: GrammarCompiler | None = None) -> None:
        self.engine = engine
        self.grammars = grammars
        self.startup_s = startup_s
        self.info = engine.client.info()

    def close(self) -> None:
        self.engine.shutdown()

    def run(
        self,
        trace: Sequence[TraceRequest],
        prompts: Sequence[Sequence[int]] | None = None,
        *,
        private: bool = False,
        whole: bool = False,
        constraint: Callable[[], TokenConstraint] | None = None,
        **params: Any,
    ) -> list[Outcome]:
        """Runs a trace.

        Args:
            private: each request has a cache salt of its own, so that no pages are shared.
            whole: nobody looks at a completion before its end, as with `LLM.generate`.
            constraint: makes each request's grammar.
            params: further fields of SamplingParams.
        """
        run = next(_names)
        vocab = self.info.vocab_size

        async def send(index: int, request: TraceRequest, prompt: Sequence[int]) -> AsyncIterator[tuple[int, int]]:
            name = f"bench-{run}-{index}"
            now = time.monotonic()
            engine_request = EngineRequest(
                name,
                tuple(t % vocab for t in prompt),
                SamplingParams(
                    **(
                        {
                            "temperature": 0.0,
                            "max_tokens": request.output_tokens,
                            "ignore_eos": True,
                            "detokenize": False,
                        }
                        | params
                    )
                ),
                priority=request.priority,
                tenant=request.tenant,
                constraint=constraint() if constraint else None,
                arrival_time=now,
                deadline=None if request.deadline is None else now + request.deadline,
                ttft_deadline=None if request.ttft_deadline is None else now + request.ttft_deadline,
                cache_salt=name if private else None,
                whole=whole,
            )
            async for output in self.engine.client.generate(engine_request):
                yield len(output.token_ids), output.num_cached_tokens

        return asyncio.run(drive(send, trace, prompts))

    def forget_prefixes(self) -> None:
        """Empties the prefix cache."""
        self.engine.call(self.engine.scheduler.pool.reset_cache)

    @property
    def prefilled_tokens(self) -> int:
        """Prompt tokens computed so far: those looked up less those found."""
        counters = self.engine.scheduler.counters
        return counters.prompt_tokens - counters.prefix_hits


@contextlib.contextmanager
def local_engine(args: argparse.Namespace, **changes: Any) -> Iterator[Local]:
    """A started engine, shut down at the end."""
    began = time.perf_counter()
    started = startup.start(engine_config(args, **changes), say=lambda line: print(line, file=sys.stderr))
    local = Local(started.engine, time.perf_counter() - began, started.grammars)
    try:
        yield local
    finally:
        local.close()


class StepRecorder:
    """Notes each step's shape and how long the device had it.

    A step's time runs from its dispatch, or the end of the step before it where that is later, to the moment its tokens
    are on the host. Wraps the runner's two calls from outside; a server that nobody records pays nothing.
    """

    def __init__(self, local: Local) -> None:
        self.records: list[StepRecord] = []
        self.ends: list[float] = []  # time.perf_counter() of each
        self._runner = local.engine.runner
        self._dispatched: dict[int, float] = {}
        self._last_end = 0.0

    def __enter__(self) -> StepRecorder:
        dispatch, collect = self._runner.dispatch_forward, self._runner.collect

        def recording_dispatch(plan: Any, slots: Any) -> Any:
            self._dispatched[plan.step_id] = time.perf_counter()
            return dispatch(plan, slots)

        def recording_collect(step: Any) -> Any:
            shape = StepShape.of(step.plan)
            result = collect(step)
            now = time.perf_counter()
            start = max(self._dispatched.pop(step.plan.step_id, now), self._last_end)
            self._last_end = now
            self.records.append(StepRecord(shape, now - start))
            self.ends.append(now)
            return result

        self._runner.dispatch_forward = recording_dispatch
        self._runner.collect = recording_collect
        return self

    def __exit__(self, *exc: object) -> None:
        del self._runner.dispatch_forward, self._runner.collect
