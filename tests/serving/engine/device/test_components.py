"""A component's weights leave the devices, come back and are replaced; programs are found by keys."""

import jax
import numpy as np
import pytest

from models.config import ModelConfig, RopeConfig
from models.dummy import random_model
from serving.engine.device.components import Component
from serving.engine.device.programs.keys import DECODER, ProgramKey
from serving.engine.requests.buckets import Bucket


def model(width: int = 16, seed: int = 0):
    rope = RopeConfig(1e4, 8)
    return random_model(ModelConfig("LlamaForCausalLM", 32, 1, width, 24, 2, 1, 8, 64, 1e-6, rope=rope), seed=seed)


@pytest.mark.parametrize("keep", [True, False])
def test_weights_leave_and_come_back(keep):
    component = Component(DECODER, model())
    component.head = [0]
    before = [np.array(leaf, copy=True) for leaf in component.leaves]
    bytes_before, leaves = component.weight_bytes, component.leaves
    assert component.head_leaves[0] is leaves[0]
    component.sleep(keep)
    assert all(leaf.is_deleted() for leaf in leaves)
    component.wake(None if keep else component_leaves(1))
    assert component.head_leaves[0] is component.leaves[0] is not leaves[0]
    same = all((a == np.asarray(b)).all() for a, b in zip(before, component.leaves, strict=True))
    assert same is keep and component.weight_bytes == bytes_before


def component_leaves(seed: int):
    return Component(DECODER, model(seed=seed)).leaves


def test_other_weights_must_fit():
    component = Component(DECODER, model())
    component.replace(component.leaves_of(model(seed=1)))
    with pytest.raises(ValueError, match="only a checkpoint of the same shape"):
        component.leaves_of(model(width=32))
    assert jax.tree.map(lambda leaf: leaf.shape, component.abstract_leaves) == tuple(
        leaf.shape for leaf in component.leaves
    )


def test_keys_say_what_they_name():
    keys = [
        ProgramKey("forward", Bucket(4, 0, 0)),
        ProgramKey("forward", Bucket(4, 0, 0, 2)),
        ProgramKey("forward", Bucket(4, 64, 2), "with adapters"),
        ProgramKey("sample", 4),
        ProgramKey("sample", 4, component="draft"),
        ProgramKey("load_slot"),
    ]
    assert [str(key) for key in keys] == [
        "forward decode 4",
        "forward decode 4x2",
        "forward decode 4 + chunk 64x2 with adapters",
        "sample 4",
        "draft: sample 4",
        "load_slot",
    ]
    assert {key: str(key) for key in keys}[ProgramKey("sample", 4)] == "sample 4"
