"""Pages travel with the checkpoint's KV heads, whatever a mesh has made of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from models.config import ModelConfig
from models.layers.heads import PlacedHeads
from serving.transfer.forms import forms_of, row_of


@pytest.mark.parametrize(
    ("K", "G", "shards"), [(3, 3, 2), (3, 3, 4), (3, 3, 8), (2, 3, 8), (1, 2, 4), (4, 2, 2), (4, 2, 1)]
)
def test_copies_and_padding_stay_at_home(K, G, shards):
    config = ModelConfig("LlamaForCausalLM", 8, 1, 8, 8, K * G, K, 4, 8, 1e-5)
    stored = np.arange(K * 8 * 4, dtype=np.float32).reshape(K, 8, 4) + 1
    placed = PlacedHeads(K, G, 4, shards)
    row = placed.keys(stored)
    array = SimpleNamespace(shape=(5, *row.shape), dtype=row.dtype)
    (form,) = forms_of([array], config, SimpleNamespace(shape={"model": shards}))
    assert form.shape == stored.shape
    np.testing.assert_array_equal(form.out(row), stored)
    np.testing.assert_array_equal(form.back(form.out(row)), row)
    (came,) = row_of(form.out(row).tobytes(), [form])
    np.testing.assert_array_equal(came, row)
    latent = SimpleNamespace(shape=(5, 99, 16), dtype=row.dtype)
    (other,) = forms_of([latent], config, SimpleNamespace(shape={"model": shards}))
    assert other.heads is None and other.shape == (99, 16)
