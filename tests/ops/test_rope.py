import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.cohere.modeling_cohere import rotate_half as rotate_interleaved
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from ops.rope import inverse_frequencies, rope

PARAMETERS = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn_tuned": {
        "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
    "yarn_mscale": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_match_transformers(name):
    parameters = PARAMETERS[name]
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=dict(parameters)
    )
    if name == "default":
        want, factor = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        want, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu")
    got, scale = inverse_frequencies(parameters, 64, 131072)
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-6)
    assert got.dtype == np.float32 and scale == pytest.approx(factor)


def test_partial_rotary_frequencies():
    got, _ = inverse_frequencies({"rope_theta": 10000.0, "partial_rotary_factor": 0.5}, 64)
    np.testing.assert_allclose(got, 10000.0 ** (-np.arange(0, 32, 2) / 32), rtol=1e-6)


def test_wrong_parameters_are_explained():
    with pytest.raises(ValueError, match="'longrope' is not supported"):
        inverse_frequencies({"rope_type": "longrope"}, 64)
    with pytest.raises(ValueError, match="needs 'low_freq_factor'"):
        inverse_frequencies({"rope_type": "llama3", "factor": 8.0}, 64)
    with pytest.raises(ValueError, match="64 frequencies"):
        rope(jnp.zeros((1, 2, 64)), jnp.zeros(1, jnp.int32), jnp.zeros(64))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("middle", [(3,), (2, 3)])
def test_rope_matches_transformers(middle, interleaved):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((7, *middle, 64)).astype(np.float32)
    positions = np.array([0, 1, 5, 100, 2047, 3, 8000], np.int32)
    inv_freq, _ = inverse_frequencies(PARAMETERS["default"], 64)
    angles = torch.tensor(positions[:, None].astype(np.float32) * inv_freq)
    heads = torch.tensor(x.reshape(7, -1, 64))
    if interleaved:
        angles = angles.repeat_interleave(2, dim=-1)[:, None]
        want = heads * angles.cos() + rotate_interleaved(heads) * angles.sin()
    else:
        angles = torch.cat([angles, angles], dim=-1)
        want, _ = apply_rotary_pos_emb(heads, heads, 1.25 * angles.cos(), 1.25 * angles.sin())
    got = rope(x, positions, inv_freq, scale=1.0 if interleaved else 1.25, interleaved=interleaved)
    np.testing.assert_allclose(got, want.numpy().reshape(x.shape), atol=5e-4)


def test_channels_beyond_the_rotary_part_pass():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 2, 32)), jnp.bfloat16)
    positions = jnp.arange(4)
    inv_freq = jnp.asarray([1.0, 0.5, 0.25, 0.1])
    out = rope(x, positions, inv_freq)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[..., 8:], x[..., 8:])
    np.testing.assert_array_equal(out[..., :8], rope(x[..., :8], positions, inv_freq))


def test_positions_of_three_numbers_match_transformers():
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

    rng = np.random.default_rng(0)
    sections = [4, 12, 16]  # channels that turn by time, height and width
    parameters = PARAMETERS["default"] | {"mrope_section": sections}
    config = Qwen2VLTextConfig(hidden_size=128, num_attention_heads=2, rope_parameters=parameters)
    x = rng.standard_normal((7, 2, 64)).astype(np.float32)
    positions = rng.integers(0, 500, (3, 7)).astype(np.int32)
    inv_freq, _ = inverse_frequencies(PARAMETERS["default"], 64)
    heads = torch.tensor(x).swapaxes(0, 1)[None]
    cos, sin = Qwen2VLRotaryEmbedding(config)(heads, torch.tensor(positions)[:, None])
    want, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    mine = np.repeat(np.arange(3), sections) == np.arange(3)[:, None]
    got = rope(x, jnp.asarray(positions), np.where(mine, inv_freq, 0.0))
    np.testing.assert_allclose(got, want[0].swapaxes(0, 1).numpy(), atol=5e-5)
    # Of text all three are the same, and it is rotated as ever.
    same = rope(x, jnp.asarray(positions[:1].repeat(3, 0)), np.where(mine, inv_freq, 0.0))
    np.testing.assert_array_equal(same, rope(x, jnp.asarray(positions[0]), inv_freq))
