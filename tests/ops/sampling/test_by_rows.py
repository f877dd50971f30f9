"""Rows shared out between devices: the same results, by two collectives."""

import json
import subprocess
import sys

from tests.ops.sampling.by_rows_on_mesh import SHAPES


def test_shared_rows_give_what_one_device_gives():
    command = [sys.executable, "-m", "tests.ops.sampling.by_rows_on_mesh"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == len(SHAPES)
    for shape, (worst, collectives) in found.items():
        assert worst < 1e-5, shape
        assert collectives == ({} if shape.endswith("63") else {"all-to-all": 1, "all-gather": 1}), shape
