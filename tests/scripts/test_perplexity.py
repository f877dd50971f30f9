import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from models.loading.load import load_model, resolve
from tests.models.tiny_reference import make_reference

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


def test_divergence_from_itself_is_nothing_and_from_four_bits_is_little(tmp_path):
    from scripts.divergence import divergence

    make_reference("llama", tmp_path / "m")
    source = resolve(str(tmp_path / "m"))
    exact, four = (
        load_model(source, max_model_len=64, quantization=scheme, progress=False).model for scheme in (None, "int4")
    )
    tokens = np.random.default_rng(0).integers(0, 380, 70).tolist()
    same = divergence(exact, exact, tokens, 40)
    assert abs(same["nats"]) < 1e-6 and same["ratio"] == 1.0 and same["agreement"] == 1.0
    rounded = divergence(exact, four, tokens, 40)
    assert 1e-6 < rounded["nats"] < 0.5 and rounded["reference_perplexity"] == same["perplexity"]
