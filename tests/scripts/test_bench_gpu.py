"""scripts/bench_gpu.py on whatever this is: that it runs to its end, and that its arithmetic is right."""

import json

import bench_gpu
import numpy as np
import pytest
from benchmarks import gpu_ops

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

    row = bench_gpu._measured(fails, "case", gpu_ops.Ceilings(1.0, 1.0))
    assert row == {"name": "case", "error": "ValueError: no such thing"}


def test_batches_are_those_of_the_tests():
    case = Case(decode=(5, 40), chunks=((20, 32), (0, 16)), page_size=16)
    batch, num_pages = gpu_ops.make_batch(case)
    want = make_arguments(case).batch
    for name in ("positions_T", "decode_len_B", "chunk_start_R", "chunk_qlen_R", "chunk_len_R", "chunk_row_N"):
        np.testing.assert_array_equal(getattr(batch, name), getattr(want, name), name)
    tables = np.concatenate([np.asarray(batch.decode_pages_BP), np.asarray(batch.chunk_pages_RP)])
    used = tables[tables > 0]
    assert sorted(used) == list(range(1, num_pages))
    page, slot = np.divmod(np.asarray(batch.kv_index_T), 16)
    assert slot.tolist() == (np.asarray(batch.positions_T) % 16).tolist() and (page > 0).all()


@pytest.mark.parametrize("name,case,dtype", [*gpu_ops.decode_cases(False), *gpu_ops.prefill_cases(False)])
def test_cases_fit_a_gpu_of_80_gb(name, case, dtype):
    from ops.paged_attention import bytes_per_page

    _, num_pages = gpu_ops.make_batch(case)
    assert num_pages * bytes_per_page(case.spec, case.page_size, dtype) < 20e9
