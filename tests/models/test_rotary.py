"""Frequencies that depend on the longest context, against transformers' own."""

import numpy as np
import pytest

from models.config import rope_from_hf
from models.layers.rotary import frequencies


@pytest.mark.parametrize("longest", [64, 256, 257, 1000])
def test_dynamic_ntk(longest):
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256, rope_parameters=parameters)
    wanted, scale = ROPE_INIT_FUNCTIONS["dynamic"](config, torch.device("cpu"), seq_len=longest)
    got, got_scale = frequencies(rope_from_hf(config.to_dict(), 16), longest)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5)
    assert got_scale == scale


def test_yarn_without_a_factor():
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "factor": None, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=256)
    config.rope_parameters = parameters
    wanted, scale = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    got, got_scale = frequencies(rope_from_hf({"rope_scaling": parameters, "max_position_embeddings": 256}, 16), 256)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-5)
    assert got_scale == scale != 1.0
