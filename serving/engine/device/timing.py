"""Steps with nothing in them: for running every program once, and for what each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from serving.engine.device.draft import DraftModel
from serving.engine.device.programs.packing import pack_forward, pack_sample
from serving.engine.device.programs.program_list import StepShapes
from serving.engine.requests.buckets import Bucket, BucketTable
from serving.engine.requests.commands import Command, Draft, Forward, Sample
from serving.engine.requests.plan import StepPlan
from serving.engine.requests.slots import SlotTable

TIMED_STEPS = 3
"""Steps of each bucket that are timed at start; the fastest counts."""

Step = tuple[Draft | None, Forward, Sample]


def worth_a_run(buckets: BucketTable, platform: str) -> list[Bucket]:
    """Those whose programs a start runs once. On a CPU a first call takes hardly longer than the second (30 of 470 ms with
    1,024 tokens, one or two with a few), so there it is decode steps and the smallest chunks, which go through all code there
    is; elsewhere any program's first call is slow."""
    smallest = min((bucket.chunk for bucket in buckets.buckets if bucket.chunk), default=0)
    return [bucket for bucket in buckets.buckets if platform != "cpu" or bucket.chunk in (0, smallest)]


def empty_step(shapes: StepShapes, replicas: int, draft: DraftModel | None, bucket: Bucket, slots: SlotTable) -> Step:
    """The commands of a step with nothing in it; in a step with drafts, a draft model guesses first."""
    empty = StepPlan(0, (), (), (), (), ())
    forward = pack_forward(empty, bucket, shapes.forward_layouts[bucket], slots, shapes.sizes.page_size)
    sample = pack_sample(empty, bucket.samples, shapes.sample_layouts[bucket.samples], slots, False)
    guess = None
    if draft is not None and bucket.queries > 1:
        guess = draft.command([empty] * replicas, bucket, slots)
    return (
        guess,
        Forward(bucket, np.tile(forward, replicas), drafted=guess is not None),
        Sample(bucket.samples, np.tile(sample, replicas), drafted=None if guess is None else bucket),
    )


def time_steps(
    buckets: Sequence[Bucket], empty: Callable[[Bucket], Step], run: Callable[[Command], Any], wait: Callable[[], Any]
) -> Iterator[tuple[Bucket, float]]:
    """What a step of each bucket takes, in seconds.

    Args:
        run, wait: start a command, and wait for all that were started.
    """
    for bucket in buckets:
        commands = [command for command in empty(bucket) if command is not None]
        found: list[float] = []
        for _ in range(TIMED_STEPS):
            wait()
            began = time.perf_counter()
            for command in commands:
                run(command)
            wait()
            found.append(time.perf_counter() - began)
        yield bucket, min(found)
