"""No family ignores an adapter: every stack that a network takes is read by its forward pass, or by its logits."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import registry
from models.adapters.adapter import Adapter, Pair
from models.adapters.attach import attach
from models.layers import Build
from models.layers.moe import Experts
from models.loading import hf_config
from models.parameters import parameters_of
from ops import native, paged_attention
from ops.linear.weights.block_round import eight_bits
from ops.paged_attention.groups import layers_per_page
from serving.engine.device.programs.program_list import StepShapes
from serving.engine.device.programs.state import DeviceState
from serving.engine.device.programs.steps import SplitModel, make_forward, used_leaves
from serving.engine.device.stores.state_store import StateStore
from serving.engine.requests.cache_specs import recurrent_of
from serving.engine.requests.sizes import Sizes
from tests.models.tiny import TINY
from tests.models.tiny_base import BASE

NAMES = [name for name in TINY if "rope" not in name and "windows" not in name]
"""What differs in positions alone takes adapters alike."""


def network(name, folder):
    """The module of a tiny model, its parameters zeros."""
    import transformers

    tiny = TINY[name]
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None or key not in BASE}
    config = getattr(transformers, tiny.config)(**fields).to_dict()
    (folder / "config.json").write_text(json.dumps({**config, "architectures": [tiny.model]}, default=str))
    hf = hf_config.read_config(folder)
    family = registry.find(hf["architectures"][0])
    model = family.build(family.config(hf), Build(max_model_len=64))
    for _, parameter in parameters_of(model):
        parameter.set_value(jnp.zeros(parameter.shape, jnp.float32))
    return model


@pytest.mark.parametrize("name", NAMES)
def test_every_stack_is_read(name, tmp_path):
    model = network(name, tmp_path)
    split, weights = SplitModel.split(model)
    room = attach(model, 1, 2, None)
    assert room.sites and room.late, "projections, and logits"
    with_adapters, stacks, places = split.with_adapters(model)
    assert places.keys() == {site.place for site in room.sites}
    sizes = Sizes(2, 16, 64, 9, 8, 0, "float32", layers_per_page(model.kv_specs(), 64))
    shapes = StepShapes.of(sizes, model, adapters=True)
    bucket = max(shapes.buckets.buckets, key=lambda one: one.tokens)
    layout = shapes.forward_layouts[bucket]
    kv = tuple(paged_attention.allocate(spec, 9, 8, jnp.float32) for spec in shapes.groups.arrays)
    recurrent = recurrent_of(model)
    if recurrent is not None:
        kv = (*kv, StateStore(recurrent, 2, 1).states)
    state = DeviceState.zeros(2, model.vocab_size)
    forward = make_forward(with_adapters, shapes.groups, layout, 8, True)
    given = weights + stacks
    found = set(used_leaves(forward, given, kv, state.ends, jax.ShapeDtypeStruct((layout.size,), jnp.int32)))
    hidden = jax.eval_shape(forward, given, kv, state.ends, jax.ShapeDtypeStruct((layout.size,), jnp.int32))[
        1
    ].hidden_SD
    logits = functools.partial(lambda leaves, h, own: with_adapters.merge(leaves).logits(h, own))
    rows = jax.ShapeDtypeStruct((hidden.shape[0],), jnp.int32)
    of_logits = set(used_leaves(logits, given, hidden, rows))
    for place, own in places.items():
        wanted = {len(weights) + own.a_NRI, len(weights) + own.b_NRO}
        assert wanted <= (of_logits if place in room.late else found), f"{name}: {place} is loaded and changes nothing"


@pytest.mark.skipif(not native.available(), reason="no native kernels")
def test_experts_in_blocks_have_room_as_dense_ones(tmp_path):
    model = network("qwen3moe", tmp_path)
    wanted = {(site.place, site.inputs, site.outputs) for site in attach(model, 1, 2, None).sites}
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            for parameter in (module.gate_up, module.down):
                parameter.set_value(eight_bits(np.zeros(parameter.shape, np.float32).reshape(-1, parameter.shape[-1])))
    assert {(site.place, site.inputs, site.outputs) for site in attach(model, 1, 2, None).sites} == wanted


def test_experts_that_are_packed_and_tensors_of_which_a_part_takes_none_are_told_of(tmp_path):
    model = network("qwen3moe", tmp_path)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, Experts):
            for parameter in (module.gate_up, module.down):
                parameter.set_value(jnp.zeros(4))  # in a layout of one CPU's kernels
    room = attach(model, 1, 2, None)

    def pair(name):
        (site,) = [site for site in room.sites if name in site.tensors]
        return Adapter(
            {name: Pair(np.zeros((2, site.inputs)), np.zeros((site.recipe.pieces[0].num_rows, 2)))}, "", "it"
        )

    experts = Adapter(
        {"model.layers.0.mlp.experts.0.down_proj.weight": Pair(np.zeros((2, 8)), np.zeros((8, 2)))}, "", "it"
    )
    with pytest.raises(ValueError, match=r"change no weight .*packed for this CPU .*--quantization none"):
        room.pack(experts)
    name = "model.layers.0.self_attn.o_proj.weight"
    assert not room.partial and len(room.pack(pair(name)))
    with pytest.raises(ValueError, match=r"o_proj\.weight is several weights here"):
        dataclasses.replace(room, partial=frozenset({name})).pack(pair(name))
