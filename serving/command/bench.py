"""jaxserve bench: the checkout's benchmarks. They are no part of a wheel: they compare with other engines, and draw."""

from __future__ import annotations

import pathlib
import runpy
import sys
from collections.abc import Sequence

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "bench.py"


def main(argv: Sequence[str], word: str = "bench") -> int:
    """Runs scripts/bench.py with the same arguments.

    Raises:
        ValueError: there is no checkout around this file.
    """
    if not SCRIPT.is_file():
        raise ValueError("benchmarks are in the checkout, not in the wheel: run `python scripts/bench.py` there.")
    sys.argv = ["jaxserve bench", *argv]
    sys.path.insert(0, str(SCRIPT.parent))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return 0
