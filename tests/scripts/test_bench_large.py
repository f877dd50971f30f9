"""The random model of 7B's shape: what it is made of, and, at its size, what its load takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from models.loading.coded import count_coded
from models.loading.load import build_model, resolve
from models.loading.opening import open_checkpoint
from ops import native
from scripts.bench_large import make

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_large.py"


def test_all_of_it_stays_as_it_is_stored(tmp_path):
    make(tmp_path / "small.gguf", layers=2, width=256, ffw=512, heads=4, kv_heads=2, vocab=64)
    opened = open_checkpoint(resolve(str(tmp_path / "small.gguf")))
    matrices = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512) + 64 * 256
    assert count_coded(build_model(opened).model, opened.checkpoint) == matrices
    assert abs(opened.checkpoint.read("model.layers.0.mlp.up_proj.weight")).mean() < 1


@pytest.mark.slow
@pytest.mark.skipif(not native.available(), reason=native.status())
def test_a_large_model_is_loaded_within_a_gigabyte_more_than_its_file(tmp_path):
    file = str(tmp_path / "large.gguf")
    subprocess.run([sys.executable, str(SCRIPT), "make", file], check=True)
    done = subprocess.run([sys.executable, str(SCRIPT), "run", file], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["file_bytes"] > 2_400_000_000 and found["peak_less_file_bytes"] < 1 << 30
