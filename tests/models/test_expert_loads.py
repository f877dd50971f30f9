"""How many tokens each expert gets, as the forward pass counts them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import Step
from models.config import ModelConfig, MoEConfig, RopeConfig
from models.dummy import random_model
from models.expert_loads import count
from ops.paged_attention import Q_BLOCK, AttentionBatch, allocate

LAYERS, E, K, PAGE = 3, 4, 2, 16


def model():
    moe = MoEConfig(E, K, 32, (False, True, True))
    config = ModelConfig(
        "Qwen3MoeForCausalLM", 64, LAYERS, 32, 48, 4, 2, 8, 64, 1e-6, rope=RopeConfig(1e4, 8), moe=moe, qk_norm="head"
    )
    return random_model(config)


def batch_of(tokens: int) -> AttentionBatch:
    """One prompt of `tokens` tokens, and padding up to Q_BLOCK."""
    position = np.arange(Q_BLOCK, dtype=np.int32)
    real = position < tokens
    one = np.full(1, tokens, np.int32)
    return AttentionBatch(
        np.where(real, position + PAGE, 0),
        np.zeros((0, 2), np.int32),
        np.zeros(0, np.int32),
        np.array([[1, 2]], np.int32),
        np.zeros(1, np.int32),
        one,
        one,
        np.zeros(1, np.int32),
    )


def test_every_real_token_visits_k_experts_of_every_layer_that_has_some():
    moe = model()
    graphdef, state = nnx.split(moe)
    kv = tuple(allocate(spec, 4, PAGE, jnp.float32) for spec in moe.kv_specs())
    tokens = np.arange(Q_BLOCK, dtype=np.int32) + 3

    @jax.jit
    def forward(state, batch, kv):
        step = Step(tokens, batch.kv_index_T % PAGE, batch)
        return count(nnx.merge(graphdef, state).forward(step, kv).visited, E, batch.kv_index_T > 0)

    few, many = (np.asarray(forward(state, batch_of(n), kv)) for n in (5, Q_BLOCK))
    assert few.shape == (2, E)
    assert few.sum(1).tolist() == [5 * K, 5 * K]
    assert many.sum(1).tolist() == [Q_BLOCK * K] * 2
    last = jax.jit(
        lambda state, batch, kv: count(
            nnx.merge(graphdef, state)
            .forward(Step(tokens, batch.kv_index_T % PAGE, batch, last_R=jnp.ones(1, jnp.int32)), kv)
            .visited,
            E,
            batch.kv_index_T > 0,
        )
    )
    assert last(state, batch_of(5), kv).sum(1).tolist() == [5 * K, K]  # the others are not computed there
    assert (few <= many).all()  # the first tokens are the same, and do not see those behind them
