"""Turns on a device of one lane: two engines of unequal steps get equal time; one alone never waits."""

from __future__ import annotations

import threading
import time

from serving.fleet.turns import Turns, TurnTaking


class Lane:
    """A device that does one step after another. A runner's step takes its `seconds`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Runner:
    def __init__(self, lane: Lane, seconds: float) -> None:
        self.lane, self.seconds, self.done = lane, seconds, 0

    def dispatch_forward(self, plan, slots):
        return object()

    def collect(self, step):
        with self.lane.lock:
            time.sleep(self.seconds)
        self.done += 1
        return step

    name = "a runner's"


def drive(runner, until):
    while time.monotonic() < until:
        runner.collect(runner.dispatch_forward(None, None))


def test_large_and_small_steps_get_the_same_share_of_the_device():
    turns, lane = Turns(), Lane()
    large, small = Runner(lane, 0.03), Runner(lane, 0.003)
    until = time.monotonic() + 1.2
    threads = [threading.Thread(target=drive, args=(TurnTaking(one, turns.join()), until)) for one in (large, small)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    used = [one.done * one.seconds for one in (large, small)]
    # Without turns the small one gets a step for each large one: a tenth of the time.
    assert min(used) > 0.5 * max(used), used


def test_alone_it_never_waits_and_what_it_used_meanwhile_is_not_held_against_it():
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    first, second = turns.join(), turns.join()
    for _ in range(5):
        turns.take(first)
        began = clock[0]
        clock[0] += 1.0
        turns.done(first, began)
    assert first.used == 5.0
    clock[0] += 0.005
    turns.take(second)  # would wait for ever if anybody had to catch up
    assert second.used == first.used
    clock[0] += 0.01
    turns.done(second, clock[0] - 0.01)
    turns.take(first)
    turns.done(first, clock[0])


def test_a_step_that_failed_is_not_waited_for():
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    lost, other = turns.join(), turns.join()
    turns.take(lost)
    clock[0] += 60.0
    assert not lost.steps(clock[0])
    turns.take(other)
    turns.take(lost)
    assert lost.in_flight == 2
    turns.done(lost, clock[0])
    turns.done(lost, clock[0])
    assert lost.in_flight == 0


def test_everything_else_is_the_runners():
    turns = Turns()
    runner = TurnTaking(Runner(Lane(), 0.0), turns.join())
    assert runner.name == "a runner's"
