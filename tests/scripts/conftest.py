"""Makes scripts/ importable, as it is for `python scripts/bench.py`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
