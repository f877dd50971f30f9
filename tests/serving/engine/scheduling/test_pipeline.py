"""The order of a step, as a device sees it."""

from __future__ import annotations

import pytest

from serving.engine.scheduling.pipeline import StepPipeline
from serving.engine.scheduling.recovery import StepFailedError
from serving.engine.scheduling.scheduler import Scheduler
from tests.serving.engine import fake_runner as fake
from tests.serving.engine.scheduling.test_scheduler import CONFIG, request


class Noting(fake.FakeDevice):
    """Notes what it is asked, by number of step."""

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.asked = []
        self.broken = ""

    def _note(self, what, plan):
        self.asked.append(f"{what} {plan.step_id}")
        if self.broken == self.asked[-1]:
            raise OSError("the device is gone")

    def dispatch_forward(self, plan, slots):
        self._note("forward", plan)
        return super().dispatch_forward(plan, slots)

    def dispatch_sample(self, step, mask_SW):
        self._note("sample", step.plan)
        super().dispatch_sample(step, mask_SW)

    def collect(self, step):
        self._note("read", step.plan)
        return super().collect(step)


def run(steps, grammar=None, asynchronous=True, broken=""):
    scheduler = Scheduler(CONFIG)
    device = Noting(scheduler)
    device.broken = broken
    tokens = []
    pipeline = StepPipeline(
        scheduler, device, lambda outputs: tokens.extend(t for o in outputs for t in o.token_ids),
        asynchronous=asynchronous,
    )  # fmt: skip
    scheduler.add(request("a", [1, 2, 3], 3, constraint=grammar))
    try:
        for _ in range(steps):
            pipeline.step()
    except StepFailedError as error:
        return pipeline, device.asked, error
    assert tokens == fake.expected([1, 2, 3], len(tokens), grammar is not None)
    return pipeline, device.asked, None


def test_a_step_is_dispatched_before_the_one_before_it_is_read():
    pipeline, asked, _ = run(4)
    assert asked == [
        "forward 1",
        "sample 1",
        "forward 2",
        "sample 2",
        "read 1",
        "forward 3",
        "sample 3",
        "read 2",
        "read 3",
    ]
    assert pipeline.in_flight is None and not pipeline.scheduler.has_work
    assert pipeline.step() is None


def test_or_read_at_once():
    assert run(2, asynchronous=False)[1] == ["forward 1", "sample 1", "read 1", "forward 2", "sample 2", "read 2"]


def test_a_mask_waits_for_the_token_before_it_while_the_forward_pass_runs():
    _, asked, _ = run(3, fake.Residues(5))
    assert asked == ["forward 1", "sample 1", "forward 2", "read 1", "sample 2", "forward 3", "read 2", "sample 3"]


@pytest.mark.parametrize("what", ["forward 2", "sample 2", "read 1"])
def test_a_failure_says_which_step_could_not_be_carried_out(what):
    _, asked, error = run(3, broken=what)
    assert asked[-1] == what and isinstance(error.__cause__, OSError)
    assert error.plan.step_id == int(what[-1])


def test_what_can_never_run_is_said_and_not_waited_for():
    scheduler = Scheduler(CONFIG)
    pipeline = StepPipeline(scheduler, fake.FakeDevice(scheduler), print)
    scheduler.add(request("a", [1]))
    scheduler.only = frozenset({"somebody else"})
    with pytest.raises(RuntimeError, match="1 requests are left, but nothing can run"):
        pipeline.step()
