"""Turns on a device of one lane: two engines of unequal steps get equal time; one alone never waits."""

from __future__ import annotations

import threading

from serving.fleet.turns import Turns, TurnTaking


class Runner:
    """A device whose step takes `seconds` of a clock."""

    name = "a runner's"

    def __init__(self, clock, seconds) -> None:
        self.clock, self.seconds, self.done = clock, seconds, 0

    def dispatch_forward(self, plan, slots):
        return object()

    def collect(self, step):
        self.clock[0] += self.seconds
        self.done += 1
        return step


def test_large_and_small_steps_get_the_same_share_of_the_device():
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    runners = [Runner(clock, 0.02), Runner(clock, 0.002)]
    taking = [TurnTaking(runner, turns.join()) for runner in runners]
    for _ in range(1000):
        for one in taking:
            if not turns.is_ahead(one._turn):  # else its thread would wait
                one.collect(one.dispatch_forward(None, None))
    used = [one.done * one.seconds for one in runners]
    # Without turns the small one gets a step for each large one: a tenth of the time.
    assert min(used) > 0.9 * max(used), used


def test_whoever_is_ahead_waits_until_the_other_has_caught_up():
    clock = [0.0]
    turns = Turns(lambda: clock[0])
    ahead, behind = turns.join(), turns.join()
    turns.take(behind)  # in flight
    turns.take(ahead)
    clock[0] += 1.0
    turns.done(ahead, 0.0)
    assert turns.is_ahead(ahead) and not turns.is_ahead(behind)
    went = threading.Event()
    thread = threading.Thread(target=lambda: (turns.take(ahead), went.set()))
    thread.start()
    assert not went.wait(0.1)
    clock[0] += 0.99
    turns.done(behind, clock[0] - 0.99)
    assert went.wait(60)
    thread.join()


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
    runner = TurnTaking(Runner([0.0], 0.0), turns.join())
    assert runner.name == "a runner's"
