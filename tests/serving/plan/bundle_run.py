"""Run as `python -m tests.serving.plan.bundle_run MODEL BUNDLE`: an engine from a bundle, and what it says and generates.

Compiling a program ends it: `jax.stages.Lowered.compile` is made to raise while the engine's programs are made.
"""

from __future__ import annotations

import asyncio
import json
import sys

import jax

from serving.boot.start import start_engine
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.device import executor

PROMPT = tuple(range(5, 45))


def generate(config: EngineConfig) -> list[int]:
    """Greedy tokens after PROMPT."""
    engine = start_engine(config, say=lambda line: print(line, file=sys.stderr))

    async def run() -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
        found: list[int] = []
        async for output in engine.client.generate(EngineRequest("one", PROMPT, params)):
            found += output.token_ids
        return found

    try:
        tokens = asyncio.run(run())
        engine.runner.guard.check()
        return tokens
    finally:
        engine.shutdown()


def main() -> None:
    model, bundle = sys.argv[1:]
    compile_all = executor.compile_all

    def without_compiler(*args, **kwargs):
        compiler = jax.stages.Lowered.compile

        def refuse(self, *args, **kwargs):
            raise AssertionError("a program was compiled")

        jax.stages.Lowered.compile = refuse
        try:
            return compile_all(*args, **kwargs)
        finally:
            jax.stages.Lowered.compile = compiler

    executor.compile_all = without_compiler
    print(json.dumps(generate(EngineConfig(model=model, compiled=bundle, progress=False))))


if __name__ == "__main__":
    main()
