"""The contrastive loss: its formula, and embedding models that learn by it."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.dummy import random_model
from serving.training import losses
from serving.training.examples import Pair
from serving.training.lora import LoraSettings
from serving.training.network import take_apart
from serving.training.packing import pair_rows
from serving.training.settings import Optimizer
from serving.training.steps import Programs, optimizer
from tests.tiny import own_tiny_model
from tests.tiny_encoder import tiny_encoder

MODES = ("mean",)


def pairs(count, negatives=False, seed=0):
    """Queries whose positive shares their tokens."""
    rng = np.random.default_rng(seed)
    found = []
    for line in range(count):
        query = tuple(int(x) for x in rng.integers(3, 90, 6))
        others = [tuple(int(x) for x in rng.permutation(query)[:5]), tuple(int(x) for x in rng.integers(3, 90, 4))]
        found.append(Pair(query, others[0], others[1] if negatives else None, line))
    return found


def test_the_formula():
    """A model whose hidden states are its token ids as vectors: cosines by hand."""

    class Ids:
        def encode(self, tokens_BS, length_B):
            return jax.nn.one_hot(tokens_BS, 100)

    rows = pair_rows(pairs(5, negatives=True), 16)
    batch = rows.take(np.array([0, 1, 2, 3, 4, -1]))
    loss, right = losses.pairs(Ids(), batch, MODES, 0.1)

    def vector(text):
        found = np.bincount(text, minlength=100).astype(np.float64)
        return found / np.linalg.norm(found)

    texts = pairs(5, negatives=True)
    queries = np.stack([vector(p.query) for p in texts])
    others = np.stack([vector(p.positive) for p in texts] + [vector(p.negative or ()) for p in texts])
    scores = queries @ others.T / 0.1
    expected = [np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(scores)]
    assert float(loss) == pytest.approx(sum(expected), rel=1e-4)
    assert float(right) == sum(row.argmax() == i for i, row in enumerate(scores))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("lora", [LoraSettings(4, 8.0), None])
def test_embedding_models_learn(kind, lora):
    model = own_tiny_model() if kind == "decoder" else random_model(tiny_encoder().config, seed=1)
    rows = pair_rows(pairs(8), 16)
    float32 = jnp.dtype("float32")
    network, frozen, trained = take_apart(model, lora, float32, float32, False, 0)
    objective = functools.partial(losses.pairs, modes=MODES, temperature=0.2)
    programs = Programs(network, objective, optimizer(Optimizer(1e-2, "constant", 0.0), 8), None, False)
    state, found = programs.start(trained), []
    for _ in range(6):
        grads, loss = programs.gradients(trained, frozen, [rows.take(np.arange(8))], 8, jax.random.key(0))
        trained, state, _ = programs.update(trained, state, grads)
        found.append(float(loss) / 8)
    assert found[-1] < 0.9 * found[0]
