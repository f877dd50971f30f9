"""Rehearsals of a start, in which native products give zeros: never while another engine of the process serves."""

from __future__ import annotations

import threading

import pytest

from ops import native
from serving.engine.device.programs import compiling
from serving.engine.device.timing import worth_a_run
from serving.engine.requests.buckets import BucketTable


@pytest.fixture
def told(monkeypatch):
    """What the kernels are told, in order; no engine of another test counts."""
    said = []
    monkeypatch.setattr(native, "_tell", said.append)
    monkeypatch.setattr(compiling, "_serving", 0)
    return said


def test_products_of_an_engine_that_serves_are_no_zeros(told):
    guards = compiling.CompileGuard(), compiling.CompileGuard()
    with compiling.rehearsing():
        assert told == [True]
    guards[0].arm()
    for own, on in ((0, False), (1, True)):
        told.clear()
        with compiling.rehearsing(own):
            assert told == [on]
    for guard in guards:
        guard.arm()
        guard.arm()  # an engine counts once
    told.clear()
    with compiling.rehearsing(1):
        assert told == [False]
    for guard in guards:
        guard.close()
        guard.close()
    told.clear()
    with compiling.rehearsing():
        assert told == [True]


def test_no_engine_begins_to_serve_during_a_rehearsal(told):
    guard = compiling.CompileGuard()
    thread = threading.Thread(target=guard.arm)
    with compiling.rehearsing():
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and not guard.armed
    thread.join(10)
    assert guard.armed
    guard.close()


def test_a_start_on_a_cpu_runs_no_large_chunk():
    table = BucketTable.make(8, 1024)
    chosen = worth_a_run(table, "cpu")
    assert {bucket.chunk for bucket in chosen} == {0, min(bucket.chunk for bucket in table.buckets if bucket.chunk)}
    assert {bucket.decode for bucket in chosen} == {bucket.decode for bucket in table.buckets}
    assert worth_a_run(table, "cuda") == list(table.buckets)
