"""What a plan says of memory is what an engine of that shape takes: no program is compiled."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig, RopeConfig
from models.mixers import DeltaNet
from models.parameters import parameters_of
from ops.paged_attention import best_layout
from ops.paged_attention.groups import KVGroups, layers_per_page
from ops.paged_attention.pages import allocate
from serving.engine.api.config import EngineConfig
from serving.engine.cache.kv_windows import pages_of
from serving.engine.device.sizing import resolve_bounds
from serving.engine.device.stores.state_store import abstract_states
from serving.engine.requests.sizes import Sizes
from serving.plan import facts
from serving.plan.memory import Room
from serving.plan.planner import _context_read, _used
from serving.plan.programs import AbstractEngine, abstract_model, bytes_on_device, config_of, layer_periods
from sharding.mesh import make_mesh

GIB = 1 << 30
PLAIN = ModelConfig(
    "Qwen3_5ForCausalLM", 256, 6, 64, 96, 4, 2, 16, 512, 1e-5, rope=RopeConfig(1e4, 4), qk_norm="head", attn_gate=True
)
DELTA = DeltaNet(2, 16, 4, 16)


def engine_of(config, max_model_len=1 << 17, **sizes):
    """The engine that a plan is made of, on one device."""
    mesh = make_mesh("model=1", jax.devices()[:1])
    model = abstract_model(config, mesh, "float32", None, max_model_len)
    together = layers_per_page(model.kv_specs(), max_model_len)
    given = {"max_num_seqs": 4, "max_num_batched_tokens": 1024, "kv_dtype": "float32"} | sizes
    return AbstractEngine(
        model, Sizes(**given, max_model_len=max_model_len, num_pages=64, page_size=16, page_bytes=0, layers_per_page=together), mesh
    )  # fmt: skip


def small(name, **fields):
    """A published configuration with its layers, heads of a sixteenth of the size and little besides."""
    hf = facts.read_config(name)
    few = {"hidden_size": 64, "intermediate_size": 32, "vocab_size": 256, "head_dim": 16, "global_head_dim": 32}
    few |= {"sliding_window": 64}
    return config_of(hf | few | {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16} | fields)


@pytest.mark.parametrize(
    ("name", "billions", "arrays", "numbers", "held"),
    [("Gemma-4-26B-A4B", 25.2, 3, 8 * 256, 3.4), ("google/gemma-4-31B-it", 30.7, 5, 16 * 256, 11.6)],
)
def test_the_large_gemmas_are_planned_as_published(name, billions, arrays, numbers, held):
    """By hand: a page of 16 positions has K and V of so many numbers in so many arrays. A sequence of 131,072 tokens in bfloat16
    takes what docs/design.md says."""
    engine = engine_of(config_of(facts.read_config(name)), kv_dtype="bfloat16")
    config = engine.model.config
    full = [spec for spec in engine.model.kv_specs() if spec.window is None]
    # Where K is V too, its rows stand twice.
    twice = sum(spec.num_kv_heads * spec.head_dim for spec in full) * config.embed_dim
    parameters = sum(bytes_on_device(leaf) / leaf.dtype.itemsize for leaf in jax.tree.leaves(engine.leaves))
    assert (parameters - twice) / 1e9 == pytest.approx(billions, abs=0.05)
    room = Room.of(engine)
    assert room.page == arrays * 16 * 2 * numbers * 2
    assert room.page * pages_of(1 << 17, room.windows, 16, 1024) / GIB == pytest.approx(held, abs=0.05)
    # A decode row reads all of what it attends to, in each layer as much as that one keeps.
    reads = sum(
        2 * 2 * spec.num_kv_heads * spec.head_dim * (5000 if spec.window is None else 1024)
        for spec in engine.model.kv_specs()
    )
    assert _context_read(engine, 5000, 1) == pytest.approx(reads)


SHAPES = {
    "26B": lambda: small("Gemma-4-26B-A4B"),
    "31B": lambda: small("Gemma-4-31B"),
    "31B, one kind of head": lambda: small("Gemma-4-31B", global_head_dim=16, num_global_key_value_heads=16),
    "hybrid": lambda: dataclasses.replace(PLAIN, mixers=(DELTA, DELTA, None) * 2),
    "states alone": lambda: dataclasses.replace(PLAIN, mixers=(DELTA,) * 6),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_engine_takes_what_is_planned(name):
    """Its sizes, and the arrays that it makes."""
    config, length = SHAPES[name](), 512
    engine = engine_of(config, length, max_num_batched_tokens=64)
    room = Room.of(engine)
    own = EngineConfig(
        max_num_seqs=4, max_num_batched_tokens=64, max_model_len=length, page_size=16, kv_cache_dtype="float32"
    )
    bounds = resolve_bounds(own, engine.model, length, "float32", None)
    for more in (400, 700, 100_000):
        memory = room.states + more * (room.page + room.state)
        sizes = bounds.within(memory)
        assert room.within(memory, length, 64) == (sizes.num_pages, sizes.num_snapshots)
    assert bounds.windows == room.windows and bounds.page_bytes == room.page
    pages = sum(
        leaf.nbytes
        for spec in KVGroups.of(engine.model.kv_specs(), bounds.layers_per_page).arrays
        for leaf in jax.tree.leaves(allocate(spec, 5, 16, jnp.float32, None, best_layout(spec, 16, jnp.float32, "cpu")))
    )
    assert pages == 5 * room.page
    if bounds.recurrent is not None:
        states = abstract_states(bounds.recurrent, 5, None, 1)
        assert sum(a.size * a.dtype.itemsize for a in states.arrays.values()) == room.states == 5 * room.state


def test_memory_for_fewer_states_than_requests_holds_nothing():
    room = Room(4, 100, 1000, (None,), 16)
    assert room.within(room.states - 1, 512, 64) == (0, 0)
    assert Room(4, 0, 1000, (), 16).at_once(2, 512) == 4


def test_layers_that_read_others_pages_read_them_too():
    """Six layers, of which the last three have no pages of their own."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    shared = small("Gemma-4-31B", num_hidden_layers=6, layer_types=kinds, num_kv_shared_layers=3)
    engine = engine_of(shared)
    assert engine.read_by_layers == (0, 1, 2, 1, 1, 2) and len(engine.model.kv_specs()) == 3
    narrow, wide = (2 * 4 * spec.num_kv_heads * spec.head_dim for spec in engine.model.kv_specs()[1:])
    assert _context_read(engine, 5000, 1) == pytest.approx(4 * 64 * narrow + 2 * 5000 * wide)
    # Layers are alike where a family's own facts of them are, too.
    assert layer_periods(small("Gemma-4-31B", num_hidden_layers=24, num_kv_shared_layers=12)) == (12, 6)


def test_tables_are_looked_up_and_routers_are_read_whole():
    mixture = engine_of(small("Gemma-4-26B-A4B", hidden_size_per_layer_input=8, vocab_size_per_layer_input=256))
    names: Counter[tuple[bool, str]] = Counter()
    paths = {
        id(leaf): path
        for path, parameter in parameters_of(mixture.model)
        for leaf in jax.tree.leaves(parameter.get_value())
    }
    for routed, leaf in _used(mixture, head=False):
        names[routed, paths[id(leaf)].removeprefix("layers.").lstrip("0123456789.")] += 1
    assert {name for routed, name in names if routed} == {"experts.experts.gate_up", "experts.experts.down"}
    assert names[False, "experts.router.weight"] == 30
    assert names[False, "per_layer.project.weight"] == 1
    assert not any(name in ("embed.weight", "per_layer.table.weight") for _, name in names)
    assert [paths[id(leaf)] for _, leaf in _used(mixture, head=True)] == ["embed.weight"]


def test_a_configuration_is_read_as_a_server_reads_it(tmp_path):
    """The text part of what sees, and what the file leaves out."""
    text = {"model_type": "gemma4_text", "num_hidden_layers": 12, "hidden_size": 64, "head_dim": 16, "vocab_size": 256}
    whole = {"architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    for path in (tmp_path, tmp_path / "config.json"):
        config = config_of(facts.read_config(str(path)))
        assert (config.num_layers, config.embed_dim, config.tie_embeddings) == (12, 64, True)
        assert config.windows.count(None) == 2
