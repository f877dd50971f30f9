"""scripts/bench_gpu.py on whatever this is: that it runs to its end, and that its arithmetic is right."""

import json
import sys

import bench_gpu
import numpy as np
import pytest
from benchmarks import gpu_ops, gpu_parts

from ops.paged_attention.cases import Case, make_arguments


def test_smoke_writes_a_page_with_every_section(tmp_path, capsys):
    only = ["ceilings", "decode", "prefill", "step", "tune"]
    assert bench_gpu.main(["--smoke", "--out", str(tmp_path), "--only", *only]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["ceilings"]["bandwidth"] > 0 and found["ceilings"]["flops"] > 0
    rows = found["decode"] + found["prefill"] + found["step"]
    assert len(rows) == 4 and not [row["error"] for row in rows if "error" in row]
    assert all(row["seconds"] > 0 for row in rows)
    page = (tmp_path / "gpu.md").read_text()
    assert page == capsys.readouterr().out.rstrip("\n") + "\n"
    assert [len(rows) for rows in found["tune"].values()] == [1, 1]
    assert not [row for rows in found["tune"].values() for row in rows if "error" in row]
    for heading in ("Decode attention", "Prefill attention", "Decode step", "Tunings"):
        assert heading in page


def test_engine_and_transformers_generate_from_the_same_weights():
    from benchmarks.gpu_engine import compare

    found = compare(2, 16, 4, smoke=True, limit_s=300)
    assert isinstance(found["ours"], float), found["ours"]
    assert isinstance(found["transformers"], float), found["transformers"]


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert bench_gpu.main(["--out", str(tmp_path), "--only", "ceilings"]) == 2
    assert "--smoke" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_case_that_fails_is_a_row():
    def fails():
        raise ValueError("no such thing\nand more")

    assert gpu_parts.measured("case", fails) == {"name": "case", "error": "ValueError: no such thing"}


@pytest.mark.parametrize(
    ("code", "limit_s", "why"),
    [
        ("import sys; sys.exit('out of luck')", 300, "ended with status 1: out of luck"),
        ("import os; os.abort()", 300, "ended with status -6"),
        ("import time; time.sleep(600)", 5, "took over 5 s"),
        ("", 300, None),
    ],
)
def test_a_part_that_fails_keeps_its_rows(code, limit_s, why):
    rows = []
    program = f"print('ROW {{\"a\": 1}}', flush=True); print('noise', flush=True)\n{code}"
    assert gpu_parts.run([sys.executable, "-c", program], limit_s, rows.append) == why
    assert rows == [{"a": 1}]


def test_a_later_call_adds_to_what_is_there(tmp_path, monkeypatch):
    device = {"device": "one", "platform": "gpu", "jax": "1"}

    def run(command, limit_s, take):
        part = command[-1]
        if part == "ceilings":
            take(device)
            take({"bandwidth": 100.0, "flops": 1000.0})
        else:
            take({"name": part, "seconds": 2.0, "bytes": 100.0, "flops": 200.0, "tokens_per_second": 1.0})
        return "no more of it" if part == "prefill" else None

    monkeypatch.setattr(gpu_parts, "run", run)
    assert bench_gpu.main(["--out", str(tmp_path), "--only", "decode"]) == 0
    assert bench_gpu.main(["--out", str(tmp_path), "--only", "prefill", "step"]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [found[part][0]["bandwidth_share"] for part in ("decode", "prefill", "step")] == [0.5] * 3
    assert found["decode"][0]["flops_share"] == 0.1 and found["failed"] == {"prefill": "no more of it"}
    assert "`prefill` did not come to its end: no more of it." in (tmp_path / "gpu.md").read_text()
    device["jax"] = "2"
    assert bench_gpu.main(["--out", str(tmp_path), "--only", "step"]) == 0
    assert "decode" not in json.loads((tmp_path / "gpu.json").read_text())


def test_batches_are_those_of_the_tests():
    case = Case(decode=(5, 40), chunks=((20, 32), (0, 16)), page_size=16)
    batch, num_pages = gpu_ops.make_batch(case)
    want = make_arguments(case).batch
    for name in ("decode_len_B", "chunk_start_R", "chunk_qlen_R", "chunk_len_R", "chunk_row_N"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(want, name), name)
    tables = np.concatenate([np.asarray(batch.decode_pages_BP), np.asarray(batch.chunk_pages_RP)])
    used = tables[tables > 0]
    assert sorted(used) == list(range(1, num_pages))
    page, slot = np.divmod(np.asarray(batch.kv_index_T), 16)
    want_page, want_slot = np.divmod(want.kv_index_T, 16)
    assert slot.tolist() == want_slot.tolist() and ((page > 0) == (want_page > 0)).all()


@pytest.mark.parametrize("name,case,dtype", [*gpu_ops.decode_cases(False), *gpu_ops.prefill_cases(False)])
def test_cases_fit_a_gpu_of_80_gb(name, case, dtype):
    from ops.paged_attention import bytes_per_page

    _, num_pages = gpu_ops.make_batch(case)
    assert num_pages * bytes_per_page(case.spec, case.page_size, dtype) < 20e9
