"""The benchmarks' own arithmetic, and each scenario on a tiny real engine: nothing here asserts a time."""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import random
import sys
from collections.abc import Iterator

import pytest
from benchmarks import frontends, host, peers, predict, scenarios, serve
from benchmarks.driving import span, throughput
from benchmarks.local import Local, StepRecorder
from benchmarks.report import latencies, standard_row
from benchmarks.work import mixed, standard_prompts, uniform

from serving.engine.api.config import EngineConfig
from serving.frontends.app import serve_http
from serving.frontends.grpc.server import GrpcServer
from serving.simulator.simulate import Outcome
from serving.simulator.trace import TraceRequest
from tests.mock_engine import mock_service
from tests.tiny import tiny_engine
from tests.tiny_checkpoint import write_tiny_checkpoint


@pytest.fixture(scope="module")
def local() -> Iterator[Local]:
    config = EngineConfig(page_size=8, progress=False, policy="priority")
    engine = Local(tiny_engine(config, max_num_seqs=4, max_model_len=256, num_pages=200))
    yield engine
    engine.close()


def options(scenario: str, **changes: float) -> argparse.Namespace:
    defaults = {name.replace("-", "_"): value for name, value in scenarios.SCENARIOS[scenario][1].items()}
    assert changes.keys() <= defaults.keys()
    return argparse.Namespace(**(defaults | changes))


def test_standard_prompts_are_what_every_peer_gets() -> None:
    rng = random.Random(0)
    expected = [[rng.randrange(100, 40000) for _ in range(128)] for _ in range(3)]
    assert standard_prompts(3, 128) == expected
    assert standard_prompts(1, 128) == expected[:1]


def test_standard_row() -> None:
    row = standard_row("jaxserve", 16, 64, 2.0, 3.456)
    assert row == {"engine": "jaxserve", "concurrency": 16, "output_tok_s": 512.0, "seconds": 2.0, "startup_s": 3.46}


def test_mixed_lengths_stay_in_their_bounds() -> None:
    trace = mixed(500, 10.0)
    assert min(r.prompt_tokens for r in trace) >= 16 and max(r.prompt_tokens for r in trace) <= 512
    assert min(r.output_tokens for r in trace) >= 8 and max(r.output_tokens for r in trace) <= 256


def test_a_trace_is_run_to_its_end(local: Local) -> None:
    trace = [TraceRequest(0.01 * i, 10 + i, 3 + i % 5) for i in range(20)]
    outcomes = local.run(trace)
    assert [o.output_tokens for o in outcomes] == [r.output_tokens for r in trace]
    assert {o.reason for o in outcomes} == {"length"}
    for o in outcomes:
        assert 0 < o.ttft <= o.e2e and not math.isnan(o.tpot)
    assert throughput(outcomes) == pytest.approx(sum(r.output_tokens for r in trace) / span(outcomes))
    row = latencies(outcomes)
    assert row["requests"] == 20 and row["failed"] == {} and set(row["ttft"]) == {"p50", "p90", "p95", "p99"}


def test_a_failing_request_is_counted_and_the_others_go_on(local: Local) -> None:
    outcomes = local.run([TraceRequest(0.0, 5000, 4), TraceRequest(0.0, 10, 4)])
    assert outcomes[0].output_tokens == 0 and outcomes[0].reason.startswith("RequestError")
    assert outcomes[1].output_tokens == 4
    assert sum(latencies(outcomes)["failed"].values()) == 1


def test_every_step_is_recorded_with_its_shape(local: Local) -> None:
    with StepRecorder(local) as recorder:
        local.run(uniform(5, 24, 6), private=True)
    assert sum(r.shape.chunk for r in recorder.records) == 5 * 32  # 24 tokens take up two blocks of 16
    assert sum(r.shape.decode for r in recorder.records) == 5 * 5  # the first token comes from the prompt
    assert all(r.seconds > 0 for r in recorder.records)
    steps = len(recorder.records)
    local.run(uniform(1, 8, 2))
    assert len(recorder.records) == steps


def test_prefix(local: Local) -> None:
    row = scenarios.prefix(local, options("prefix", users=6, system_tokens=96, own_tokens=8, output_tokens=4))
    assert row["cached_share"] == round(96 / 104, 4)


def test_rag_computes_less_by_what_is_shared(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(rate: float, seed: int, documents: int) -> Iterator[TraceRequest]:
        for i in range(1000):
            yield TraceRequest(0.0, 48, 2, prefix=((0, 16), (1 + i % documents, 16)))

    monkeypatch.setattr(scenarios, "rag", short)
    row = scenarios.rag_trace(local, options("rag", requests=12, documents=2))
    assert row["shareable_share"] == round((11 * 16 + 10 * 16) / (12 * 48), 4)
    assert 0 < row["computed_cut"] <= row["shareable_share"]


def test_longprompt(local: Local) -> None:
    row = scenarios.longprompt(local, options("longprompt", streams=3, stream_tokens=40, prompt_tokens=200, after=0.01))
    assert row["budget"] == 64 and row["decode_step_s"] > 0 and row["long_prompt_ttft_s"] > 0


def test_static_and_priority_and_waste(local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    short = [TraceRequest(0.01 * i, 8 + i % 9, 2 + i % 7, priority=i % 2) for i in range(40)]
    monkeypatch.setattr(scenarios, "mixed", lambda count, rate, seed: short[:count])
    monkeypatch.setattr(scenarios, "overload", lambda rate, seed, urgent_share: iter(short))
    row = scenarios.static(local, options("static", requests=20, batch=5))
    assert row["static_batch"] == 5 and row["throughput_ratio"] > 0
    row = scenarios.priority(local, options("priority", calibrate=10, requests=30))
    assert row["urgent_p95_ttft_overload_s"] > 0
    row = scenarios.waste(local, options("waste", requests=10))
    assert 0 <= row["waste_paged"] < row["waste_contiguous"] < 1


def test_host_runs_the_real_engine_around_a_fake_device() -> None:
    row = host.measure(running=12, steps=10, step_s=0.0, max_model_len=64, asynchronous=True)
    assert row["running"] == 12 and row["host_ms_median"] > 0


def outcome(tpot: float, ttft: float = 0.5) -> Outcome:
    return Outcome(0.0, 0, 16, 0, 8, ttft, tpot, tpot, ttft + 7 * tpot, "length")


def test_prediction_is_compared_with_what_was_measured() -> None:
    row = predict.compare([outcome(0.1), outcome(0.1)], [outcome(0.1, ttft=0.6), outcome(0.2, ttft=0.6)])
    assert row["ttft_median"] == {"measured": 0.5, "predicted": 0.6, "error": 0.2}
    assert row["tpot_median"]["error"] == 0.5
    assert predict.compare([outcome(0.0)], [outcome(0.1)])["tpot_median"]["error"] is None


def test_calibration_has_prompts_of_all_lengths_beside_streams() -> None:
    made = [predict.beside(i, 1000) for i in range(predict.BESIDE)]
    assert {len(one) for one in made} == {2, 3, 4}
    assert (made[0][-1].prompt_tokens, made[-1][-1].prompt_tokens) == (16, 1000)
    assert all(stream.output_tokens > one[-1].output_tokens for one in made for stream in one[:-1])


ROWS: peers.Rows = {"ours": {1: [10.0, 12.0, 11.0], 16: [80.0]}, "theirs": {1: [5.5], 16: []}}


def test_peers_table_gives_ratios_of_medians() -> None:
    lines = peers.table(ROWS, "ours").splitlines()
    assert lines[0] == "| engine | 1 | 16 |"
    assert lines[2] == "| ours | 11 | 80 |"
    assert lines[3] == "| theirs | 6 (2.00x) | - |"


def test_a_peer_is_a_command_that_prints_rows(tmp_path: pathlib.Path) -> None:
    row = standard_row("other", 4, 64, 1.0, 0.5)
    script = tmp_path / "other.py"
    script.write_text(f"print('hello')\nprint({json.dumps(json.dumps(row))})\n")
    assert list(peers.standard_rows("other", [sys.executable, str(script)])) == [row]
    script.write_text("raise RuntimeError('no weights')")
    with pytest.raises(SystemExit, match="no weights"):
        list(peers.standard_rows("other", [sys.executable, str(script)]))


async def test_a_served_trace_over_grpc_and_http() -> None:
    """The real front ends around a mock engine."""
    service = mock_service()
    grpc_server = GrpcServer("127.0.0.1", 0)
    await grpc_server.start()
    await grpc_server.serve(service)
    http_server = await serve_http(service, host="127.0.0.1", port=0)
    try:
        trace = [TraceRequest(0.01 * i, 12, 3 + i) for i in range(5)]
        prompts = [[1 + i] * 12 for i in range(5)]
        for target, over in (
            (f"127.0.0.1:{grpc_server.port}", serve.over_grpc),
            (http_server.url.removeprefix("http://"), serve.over_http),
        ):
            outcomes = await over(target, trace, prompts)
            assert [o.reason for o in outcomes] == ["length"] * 5
            assert [o.output_tokens for o in outcomes] == [3, 4, 5, 6, 7]
            wrong = await over(target, trace[:2], [[10**6] * 12] * 2)
            assert len({o.reason for o in wrong}) == 1 and "length" not in {o.reason for o in wrong}
    finally:
        await http_server.stop(0.0)
        await grpc_server.stop(0.0)


def test_frontends_count_the_time_of_the_event_loop(tmp_path, capsys):
    model = str(write_tiny_checkpoint(tmp_path / "model"))
    args = argparse.Namespace(
        client=None, kinds=["grpc", "minimal"], streams=2, step_ms=5.0, seconds=0.5, model=model, json=True
    )
    frontends.run(args)
    served, minimal = map(json.loads, capsys.readouterr().out.splitlines())
    assert (served["kind"], minimal["kind"]) == ("grpc", "minimal")
    assert served["event_loop_cpu_ms"] > 0 < minimal["event_loop_cpu_ms"]
    assert served["engine_thread_cpu_ms"] > 0 == minimal["engine_thread_cpu_ms"]
