"""One request before the first, so that the first is as fast as the tenth.

Every program has run once when the engine's thread begins, but on another thread. What that thread pays for its own first
calls (memory arenas, JAX's and XLA's state by thread, pages of code and data) is 10 to 20 ms of the default model's first
token, and is paid here, before anybody is told that the server is ready.
"""

from __future__ import annotations

import dataclasses
import time

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.device.programs.compiling import rehearsing
from serving.engine.device.runner import StepRunner
from serving.engine.scheduling.pipeline import StepPipeline
from serving.engine.scheduling.scheduler import Scheduler

PROMPT_TOKENS = 8


def rehearse(scheduler: Scheduler, runner: StepRunner) -> None:
    """Runs a prompt and a decode step to their end, on the calling thread: the engine's, between two steps with nothing running.

    It leaves no trace: another scheduler of the same configuration plans it, so that nothing is counted, cached or named in
    the one that serves. Only the first pages and one slot of the device are written, which nobody reads before writing them.
    """
    config = scheduler.config
    outputs = 1 + min(2, config.num_scheduler_steps or 1)  # the prompt's, and those of one dispatch of decode steps
    tokens = min(PROMPT_TOKENS, config.max_model_len - outputs)
    if tokens < 1:
        return
    pages = 2 + -(-(tokens + outputs) // config.page_size)  # the null page, and one to spare
    stand_in = type(scheduler)(dataclasses.replace(config, num_pages=pages, host_pages=0))
    # Every table of a slot is written, and the whole sampler runs.
    params = SamplingParams(
        temperature=1.0, top_k=20, top_p=0.9, seed=0, repetition_penalty=1.1, max_tokens=outputs, ignore_eos=True
    )
    stand_in.add(EngineRequest("rehearsal", (0,) * tokens, params, arrival_time=time.monotonic()))
    loads = runner.expert_loads
    pipeline = StepPipeline(stand_in, runner, lambda outputs: None, asynchronous=False)
    with rehearsing(own=1):
        while stand_in.has_work:
            pipeline.step()
    runner.expert_loads = loads
