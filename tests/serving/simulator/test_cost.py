"""The cost model finds the weights it was made from and stays sane on noisy steps."""

from __future__ import annotations

import dataclasses
import pathlib

import numpy as np
import pytest

from serving.simulator.cost import FEATURES, CostModel, StepRecord, StepShape, fit, read_records, write_records

TRUE = CostModel((4e-3, 0.0, 2e-3, 3e-4, 5e-4, 1e-4, 0.0, 3e-7, 2e-9), 64, 1024)


def shapes(count: int, seed: int = 0) -> list[StepShape]:
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        decode = int(rng.integers(0, 65))
        chunk = 16 * int(rng.integers(0, 60)) if rng.random() < 0.5 or not decode else 0
        rows = 0 if not chunk else int(rng.integers(1, min(16, chunk // 16) + 1))
        if decode or chunk:
            found.append(StepShape(decode, chunk, rows, decode * int(rng.integers(1, 900)), chunk * 300.0))
    return found


def test_exact_steps_are_predicted_exactly() -> None:
    records = [StepRecord(s, TRUE.seconds(s)) for s in shapes(400)]
    model = fit(records, 64, 1024)
    assert np.abs(model.errors(records)).max() < 1e-3
    fresh = [StepRecord(s, TRUE.seconds(s)) for s in shapes(200, seed=9)]
    assert np.abs(model.errors(fresh)).max() < 5e-3


def test_hiccups_do_not_bend_the_fit() -> None:
    rng = np.random.default_rng(0)
    records = [
        StepRecord(s, TRUE.seconds(s) * rng.normal(1, 0.03) * (5 if rng.random() < 0.05 else 1)) for s in shapes(800)
    ]
    errors = fit(records, 64, 1024).errors([StepRecord(s, TRUE.seconds(s)) for s in shapes(200, seed=1)])
    assert np.abs(errors).max() < 0.08


def test_steps_that_take_longer_now_and_then_are_told_by_their_mean() -> None:
    """Every third takes half as long again: so do three of them together, in the sum."""
    slow = [StepRecord(s, TRUE.seconds(s) * (1.5 if i % 3 == 0 else 1.0)) for i, s in enumerate(shapes(900))]
    model = fit(slow, 64, 1024)
    assert sum(model.seconds(r.shape) for r in slow) == pytest.approx(sum(r.seconds for r in slow), rel=0.02)


def test_a_bucket_off_the_line_gets_its_own_factor() -> None:
    records = [StepRecord(s, TRUE.seconds(s) * (3 if s.decode == 1 and not s.chunk else 1)) for s in shapes(600)]
    records += [StepRecord(StepShape(1, 0, 0, n, 0.0), 3 * TRUE.seconds(StepShape(1, 0, 0, n, 0.0))) for n in range(20)]
    model = fit(records, 64, 1024)
    alone = StepShape(1, 0, 0, 100, 0.0)
    assert model.seconds(alone) == pytest.approx(3 * TRUE.seconds(alone), rel=0.02)
    full = StepShape(64, 0, 0, 6400, 0.0)
    assert model.seconds(full) == pytest.approx(TRUE.seconds(full), rel=0.02)


def test_weights_are_never_negative() -> None:
    rng = np.random.default_rng(3)
    records = [StepRecord(s, float(rng.uniform(0.01, 0.2))) for s in shapes(60)]
    assert min(fit(records, 64, 1024).weights) >= 0


def test_too_few_steps() -> None:
    with pytest.raises(ValueError, match="3 recorded steps"):
        fit([StepRecord(s, 0.1) for s in shapes(3)[:3]], 64, 1024)


def test_padding_is_paid_for() -> None:
    bucket, _ = TRUE.price(StepShape(33, 0, 0, 0, 0.0))
    assert bucket.decode == 64
    assert TRUE.seconds(StepShape(33, 0, 0, 0, 0.0)) == TRUE.seconds(StepShape(64, 0, 0, 0, 0.0))


def test_padding_that_is_left_out_costs_less() -> None:
    """The native products of a CPU: a step in a program for 64 rows takes the time of its own."""
    true = dataclasses.replace(TRUE, weights=(4e-3, 0.0, 2e-3, 1e-4, 1e-4, 1e-4, 4e-4, 3e-7, 2e-9))
    model = fit([StepRecord(s, true.seconds(s)) for s in shapes(400)], 64, 1024)
    few, many = StepShape(33, 0, 0, 0, 0.0), StepShape(64, 0, 0, 0, 0.0)
    assert model.seconds(few) == pytest.approx(true.seconds(few), rel=0.01)
    assert model.seconds(many) - model.seconds(few) == pytest.approx(31 * 4e-4, rel=0.05)


def test_files(tmp_path: pathlib.Path) -> None:
    records = [StepRecord(s, round(TRUE.seconds(s), 7)) for s in shapes(50)]
    write_records(tmp_path / "steps.jsonl", records)
    assert list(read_records(tmp_path / "steps.jsonl")) == records
    model = fit(records, 64, 1024, host_s=1e-3)
    model.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == model
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="not a cost model"):
        CostModel.load(tmp_path / "bad.json")


def test_the_default_model_loads() -> None:
    path = pathlib.Path(__file__).resolve().parents[3] / "serving/simulator/cpu_cost.json"
    model = CostModel.load(path)
    assert len(model.weights) == len(FEATURES)
    one, many = StepShape(1, 0, 0, 100, 0.0), StepShape(64, 0, 0, 6400, 0.0)
    assert 0 < model.seconds(one) < model.seconds(many) < 64 * model.seconds(one)
