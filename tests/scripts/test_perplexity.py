import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from models.loading.load import load_model, resolve
from tests.models.tiny import make_reference

SCRIPT = Path(__file__).parents[2] / "scripts" / "perplexity.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("perplexity_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agrees_with_transformers(script, tmp_path):
    make_reference("llama", tmp_path / "m")
    source = resolve(str(tmp_path / "m"))
    model = load_model(source, max_model_len=64, progress=False).model
    tokens = np.random.default_rng(0).integers(0, 380, 101).tolist()
    ours, theirs = script.perplexity(model, tokens, 40), script.reference(source, tokens, 40)
    assert math.isclose(ours, theirs, rel_tol=1e-4)
    assert ours > 10
    with pytest.raises(ValueError, match="at least two"):
        script.perplexity(model, [1], 40)
