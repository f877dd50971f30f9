"""The simulator's command line."""

from __future__ import annotations

import json
import pathlib

import pytest
import simulate

from serving.simulator.cost import CostModel, StepRecord, StepShape, write_records


def test_policies_are_compared_on_one_trace(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.main(
        ["--trace", "overload", "--rate", "20", "--requests", "120", "--json", "--policy", "fcfs", "priority"]
    )
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["policy"] for r in rows] == ["fcfs", "priority"]
    assert all(r["requests"] == 120 for r in rows)
    urgent = [r["by_group"]["priority 0"]["ttft"]["p95"] for r in rows]
    assert urgent[1] < urgent[0]


def test_routings_are_compared_on_several_engines(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.main(
        ["--trace", "agents", "--rate", "0.5", "--requests", "60", "--json", "--engines", "3", "--num-pages", "900",
         "--routing", "round-robin", "cache"]
    )  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["policy"] for r in rows] == ["fcfs, round-robin", "fcfs, cache"]
    assert all(r["requests"] == 60 and r["requests_an_engine"][0] > 0 for r in rows)
    assert rows[1]["computed_prompt_tokens"] < rows[0]["computed_prompt_tokens"]
    assert rows[0]["decisions"] == {"turn": 60} and rows[1]["decisions"]["prefix"] > 0


def test_shares_of_engines_that_prefill_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    simulate.main(
        ["--trace", "rag", "--rate", "1", "--requests", "40", "--json", "--engines", "3", "--num-pages", "900",
         "--prefill-engines", "0", "1", "--prefill-policy", "always"]
    )  # fmt: skip
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["policy"] for r in rows] == ["fcfs, cache, 0 prefill", "fcfs, cache, 1 prefill"]
    assert all(r["requests"] == 40 and r["reasons"] == {"length": 40} for r in rows)
    assert "prefills" not in rows[0] and rows[1]["prefills"]["apart"] > 30
    assert rows[1]["worst_gap"]["p99"] < rows[0]["worst_gap"]["p99"]


def test_a_written_trace_replays_the_same(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "t.jsonl")
    simulate.main(["--trace", "rag", "--rate", "3", "--requests", "60", "--write-trace", path])
    capsys.readouterr()
    results = []
    for trace in (["--trace", "rag", "--rate", "3", "--requests", "60"], ["--trace", path]):
        simulate.main([*trace, "--json"])
        row = json.loads(capsys.readouterr().out)
        results.append({k: v for k, v in row.items() if k != "wall_s"})
    assert results[0] == results[1]


def test_fit(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    true = CostModel((4e-3, 0.0, 2e-3, 3e-4, 5e-4, 1e-4, 0.0, 3e-7, 2e-9), 8, 256)
    shapes = [StepShape(d, c, int(c > 0), 40 * d, 10.0 * c) for d in range(9) for c in (0, 16, 64, 240) if d or c]
    write_records(tmp_path / "steps.jsonl", [StepRecord(s, true.seconds(s)) for s in shapes])
    sizes = ["--max-num-seqs", "8", "--max-num-batched-tokens", "256"]
    simulate.main(["--fit", str(tmp_path / "steps.jsonl"), "--out", str(tmp_path / "cost.json"), *sizes])
    assert "median error 0.0%" in capsys.readouterr().out
    simulate.main(["--trace", "short", "--requests", "20", "--cost", str(tmp_path / "cost.json"), "--json"])
    assert json.loads(capsys.readouterr().out)["requests"] == 20


@pytest.mark.parametrize(
    "wrong",
    [
        ["--trace", "nowhere.jsonl"],
        ["--rate", "0"],
        ["--policy", "lifo"],
        ["--policy", "fcfs+luck"],
        ["--prefill-engines", "1"],
        ["--prefill-engines", "3", "--engines", "3"],
        ["--transfer-lag-s", "-1"],
        ["--cores", "0"],
    ],
)
def test_wrong_arguments_are_explained(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        simulate.main(wrong)
    assert stopped.value.code == 2
    assert wrong[1] in capsys.readouterr().err


def test_plot(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is an optional extra")
    simulate.main(["--trace", "short", "--requests", "30", "--plot", str(tmp_path / "p.png")])
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
