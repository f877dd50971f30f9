"""How long the engine waits before it schedules the next step."""

from __future__ import annotations

import pytest

from serving.engine.scheduling.pacing import MIN_STEP_S, RESERVE_S, Pacer


def test_what_is_not_known_is_not_waited_for():
    pacer = Pacer()
    assert pacer.wait("a") == 0.0
    pacer.observe("b", 1.0)
    assert pacer.wait("a") == 0.0


def test_short_steps_are_not_waited_in():
    pacer = Pacer()
    pacer.observe("a", 0.9 * MIN_STEP_S)
    assert pacer.wait("a") == 0.0


def test_the_wait_ends_well_before_the_shortest_step_of_late():
    pacer = Pacer()
    for seconds in (0.3, 0.2, 0.3, 0.3):
        pacer.observe("a", seconds)
    assert 0 < pacer.wait("a") < 0.2 - RESERVE_S
    for _ in range(500):
        pacer.observe("a", 0.3)
    assert 0.2 < pacer.wait("a") < 0.3 - RESERVE_S
    pacer.observe("a", 0.1)
    assert pacer.wait("a") == pytest.approx(0.85 * 0.1 - RESERVE_S)
