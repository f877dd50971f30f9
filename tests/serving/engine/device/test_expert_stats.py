"""How evenly a mixture's experts are loaded, from the device to the metrics."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from models.config import ModelConfig, MoEConfig, RopeConfig
from models.dummy import random_model
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.metrics.metrics import Metrics
from tests.tiny import VOCAB, tiny_engine

E, K, LAYERS = 4, 2, 2


@pytest.mark.parametrize("steps", [1, 4])
def test_every_token_counts_once_in_every_layer_with_experts(steps):
    moe = MoEConfig(E, K, 32, (True,) * LAYERS)
    rope = RopeConfig(10000.0, 16)
    config = ModelConfig(
        "Qwen3MoeForCausalLM", VOCAB, LAYERS, 64, 96, 4, 2, 16, 512, 1e-5, rope=rope, moe=moe, qk_norm="head"
    )
    engine = tiny_engine(model=random_model(config), steps=steps, max_num_seqs=1, max_num_batched_tokens=32)
    metrics = Metrics(engine.client)

    async def run() -> None:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        async for _ in engine.client.generate(EngineRequest("r", tuple(range(3, 23)), params)):
            pass

    try:
        assert "expert_tokens_total{" not in metrics.render()[0].decode()
        asyncio.run(run())
        engine.call(lambda: None)  # the step behind the last token has been read
        loads = engine.client.stats().expert_loads
    finally:
        engine.shutdown()
    assert loads is not None
    assert loads.shape == (LAYERS, E)
    # The last token is not computed; a step that was in flight may have. Of a dispatch of several steps, all are.
    computed = 20 + 9 - 1
    *before, last = loads.sum(axis=1).tolist()
    assert set(before) <= {(computed + more) * K for more in range(steps + 1)}
    # The last layer computes of the prompt the token that samples alone.
    assert last in {(computed - 19 + more) * K for more in range(steps + 1)}
    text = metrics.render()[0].decode()
    counted = [
        float(line.split()[-1]) for line in text.splitlines() if line.startswith("jaxserve:expert_tokens_total{")
    ]
    assert counted == loads.sum(axis=0).tolist()
    ratios = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("jaxserve:expert_load_ratio{")]
    np.testing.assert_allclose(ratios, loads.max(axis=1) / loads.mean(axis=1))
