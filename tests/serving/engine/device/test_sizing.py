"""What the engine chooses where the operator leaves it open."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ops import native
from ops.paged_attention import KVGroups, KVSpec
from serving.engine.api.config import EngineConfig
from serving.engine.device import sizing
from serving.engine.device.sizing import (
    Bounds,
    batch_sizes,
    bytes_of_page,
    default_kv_memory,
    resolve_kv_dtype,
    resolve_sizes,
)
from serving.engine.requests.cache_specs import RecurrentSpec, StateArray


@dataclasses.dataclass
class Layers:
    """As much of a model as sizing looks at."""

    specs: tuple[KVSpec, ...]
    exact_pages: bool = False

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.specs


PLAIN = KVSpec(num_kv_heads=2, head_dim=64, v_head_dim=64)
ODD = KVSpec(num_kv_heads=2, head_dim=20, v_head_dim=20)  # no native kernel
vectorized = pytest.mark.skipif(
    not native.available() or native.isa() == "generic", reason="needs vectorized native kernels"
)


LATENT = KVSpec(num_kv_heads=1, head_dim=64, v_head_dim=0)
PARTS = KVSpec(num_kv_heads=2, head_dim=96, v_head_dim=96)  # mixed in blocks of 32


def kv_dtype(specs=(PLAIN,), devices=1, exact=False, draft=None, **options):
    """For a model that computes in float32."""
    model: Any = Layers(specs, exact)
    beside: Any = None if draft is None else Layers(draft)
    return resolve_kv_dtype(EngineConfig(**options), model, "float32", devices, beside)


@pytest.fixture
def fast(monkeypatch):
    """A machine that multiplies pages of 8 bits as they lie."""
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "isa", lambda: "bf16")


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4"}, {"enable_lora": True}])
def test_pages_are_of_8_bits_beside_rounded_weights(fast, options):
    assert kv_dtype(**options) == "int8"
    assert kv_dtype(specs=(PLAIN, dataclasses.replace(PLAIN, head_dim=256, v_head_dim=256, window=512))) == "int8"
    assert kv_dtype(draft=(PLAIN,), **options) == "int8"
    assert kv_dtype(page_size=16, **options) == "int8"


@pytest.mark.parametrize(
    "options",
    [
        {"specs": (PLAIN, PARTS)},
        {"specs": (dataclasses.replace(PLAIN, v_head_dim=96),)},
        {"draft": (PARTS,)},
        {"exact": True},
    ],
)
def test_pages_are_bfloat16_where_8_bits_were_not_measured_or_do_not_hold_them(fast, options):
    assert kv_dtype(**options) == "bfloat16"


@pytest.mark.parametrize("isa", ["avx2", "avx512", "vnni"])
def test_pages_are_bfloat16_where_8_bits_are_slower(monkeypatch, isa):
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "isa", lambda: isa)
    assert kv_dtype() == kv_dtype(quantization="int8") == "bfloat16"


def test_an_engine_has_the_page_size_of_the_pages_that_it_took(fast):
    """And no longer context than it asked for is needed to fill a page."""

    def of(**options):
        config = EngineConfig(max_num_seqs=1, kv_cache_memory=1 << 24, **options)
        return resolve_sizes(config, Layers((PLAIN,)), 1024, "float32", None, platform="cpu")  # pyright: ignore[reportArgumentType]

    assert (of().kv_dtype, of().page_size) == ("int8", 64)
    assert (of(kv_cache_dtype="bfloat16").page_size, of(dtype="float32").page_size) == (16, 16)
    assert (of(page_size=16).kv_dtype, of(page_size=16).page_size) == ("int8", 16)
    assert of(max_model_len=32).num_pages == of(max_model_len=64).num_pages == 2


@vectorized
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "quantization": "int8"},
        {"quantization": "none"},
        {"devices": 2},
        {"specs": (PLAIN, ODD)},
        {"specs": (LATENT,)},
        {"specs": (PLAIN, dataclasses.replace(PLAIN, indexed=True))},
        {"attention_backend": "xla"},
        {"page_size": 8},
    ],
)
def test_pages_follow_the_compute_dtype_otherwise(options):
    assert kv_dtype(**options) == "float32"


def test_large_models_that_a_checkpoint_has_in_blocks_stay_as_they_are(monkeypatch):
    """Left open, on one CPU with VNNI, and on accelerators: elsewhere, if small and beside adapters they are int8 or nothing."""
    large = sizing.LEAST_IN_BLOCKS

    def chosen(isa="vnni", platform="cpu", devices=1, in_blocks=large, **options):
        monkeypatch.setattr(sizing.native, "available", lambda: isa != "none")
        monkeypatch.setattr(sizing.native, "isa", lambda: isa)
        return sizing.resolve_quantization(EngineConfig(**options), platform, devices, in_blocks)

    assert chosen() == chosen("bf16") == "stored"
    assert chosen(in_blocks=large - 1) == chosen("avx2") == chosen(enable_lora=True) == "int8"
    assert chosen("generic") is chosen("none") is chosen(devices=2) is None
    assert chosen(platform="gpu") == chosen(platform="tpu", devices=8) == "stored"
    assert chosen(platform="gpu", in_blocks=0) is None
    assert chosen(dtype="float32") is chosen(quantization="none") is None
    assert (chosen(quantization="int8"), chosen(quantization="int4")) == ("int8", "int4")


def test_what_is_asked_for_is_taken():
    assert kv_dtype(kv_cache_dtype="int8") == "int8"
    assert kv_dtype(kv_cache_dtype="float32") == "float32"


def test_without_native_kernels_pages_are_float32(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert kv_dtype() == "float32"


def sizes(platform, **options):
    options = {"dtype": "bfloat16", "max_num_seqs": 4, "max_model_len": 256, "kv_cache_memory": 1 << 24} | options
    config = EngineConfig(**options)
    return resolve_sizes(config, Layers((PLAIN,)), 1024, "bfloat16", None, platform=platform)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("dtype,least", [("bfloat16", 16), ("float8_e4m3fn", 32), ("int8", 128), ("float32", 16)])
def test_pages_on_tpu_hold_whole_tiles(dtype, least):
    assert sizes("tpu", kv_cache_dtype=dtype).page_size == least
    assert sizes("gpu", kv_cache_dtype=dtype).page_size == 16
    assert sizes("tpu", kv_cache_dtype=dtype, page_size=256).page_size == 256


def test_pages_of_8_bits_hold_more_tokens_on_a_cpu():
    """Unless the configuration says how many."""
    assert sizes("cpu", kv_cache_dtype="int8").page_size == 64
    assert sizes("cpu", kv_cache_dtype="bfloat16").page_size == 16
    assert sizes("cpu", kv_cache_dtype="int8", page_size=16).page_size == 16


def test_pages_are_counted_in_the_layout_of_the_platform():
    # K and V of 64 share 128 lanes; of 20 they share as many, of which 88 are padding.
    assert sizes("tpu").page_bytes == sizes("gpu").page_bytes == 2 * 16 * 128 * 2
    assert bytes_of_page(KVGroups.of((ODD,)), 16, "bfloat16", "gpu") == 2 * 16 * 40 * 2
    assert bytes_of_page(KVGroups.of((ODD,)), 16, "bfloat16", "tpu") == 2 * 16 * 128 * 2
    assert sizes("tpu", kv_cache_dtype="int8").page_bytes == 2 * 128 * 128 + 2 * 2 * 128 * 4  # and a scale each
    assert sizes("tpu").num_pages == 4 * 16 + 1


def test_layers_with_windows_take_less():
    """Three layers with a window of 64 and one that sees all: pages of one layer, of which long sequences take few."""
    specs = (*(dataclasses.replace(PLAIN, window=64),) * 3, PLAIN)
    page = 2 * 16 * (64 + 64) * 2  # one layer's: 2 heads, 16 positions, K and V in bfloat16

    def of(memory, **options):
        config = EngineConfig(dtype="bfloat16", max_num_seqs=4, kv_cache_memory=memory, **options)
        return resolve_sizes(config, Layers(specs), 1024, "bfloat16", None, platform="gpu")  # pyright: ignore[reportArgumentType]

    small = of(41 * page)
    assert (small.layers_per_page, small.page_bytes, small.num_pages) == (1, page, 41)
    assert small.max_model_len == (40 - 3 * 6) * 16  # a window is in at most six pages, one of them not indexed yet
    assert of(1 << 30).max_model_len == 1024
    with pytest.raises(ValueError, match="one sequence of 400 tokens needs"):
        of(41 * page, max_model_len=400)
    assert of(41 * page, max_model_len=64).layers_per_page == 4  # nothing falls behind a window


@pytest.mark.parametrize(
    "given,replicas,wanted",
    [
        ((256, 4096), 3, (86, 1360)),  # 1,365 tokens a replica, in whole pieces of 16
        ((None, None), 1, (256, 4096)),
        ((None, 64), 1, (48, 64)),
        ((300, None), 1, (300, 4096)),
        ((5000, None), 1, (5000, 5024)),
    ],
)
def test_replicas_share_what_was_given(given, replicas, wanted):
    """The planner's sizes are these too: it asks the same function."""
    assert batch_sizes(*given, replicas, cpu=False) == wanted


def test_states_and_snapshots_share_the_memory_with_pages():
    spec = RecurrentSpec((StateArray("conv", (3, 100)), StateArray("matrix", (4, 8, 8))))
    bounds = Bounds(8, 64, 4096, 16, 1000, "float32", None, (None,), 2, None, spec)
    memory = 3_000_000
    sizes = bounds.within(memory)
    states = (8 + 1 + sizes.num_snapshots) * spec.state_bytes
    assert sizes.num_pages == (memory // 2 - states) // 1000
    assert sizes.num_snapshots == (memory // 2 - 9 * spec.state_bytes) // 4 // spec.state_bytes > 100
    assert states + sizes.num_pages * 1000 <= memory // 2
    with pytest.raises(ValueError, match="one sequence of 32 tokens needs"):
        bounds.within(2 * 9 * spec.state_bytes)  # nothing is left for pages
    with pytest.raises(ValueError, match=r"states of recurrent layers alone need .* for 16 requests at once"):
        bounds.within(2 * 8 * spec.state_bytes)
    few = dataclasses.replace(bounds, given_seqs=False).within(memory // 40)
    assert few.max_num_seqs == memory // 80 // 2 // spec.state_bytes - 1 < 8, "where nobody said how many"
    assert dataclasses.replace(bounds, given_seqs=False).within(memory).max_num_seqs == 8
    alone = dataclasses.replace(bounds, windows=(), page_bytes=0).within(memory)
    assert (alone.num_pages, alone.max_model_len) == (2, 4096), "the null page, and one that nobody asks for"
    assert (9 + alone.num_snapshots) * spec.state_bytes <= memory // 2 < (10 + alone.num_snapshots) * spec.state_bytes


@pytest.mark.parametrize("platform, free", [("gpu", 40), ("cpu", 4)])
def test_what_adapters_take_is_not_the_pages(monkeypatch, platform, free):
    """A GPU of 48 GiB with 3 in use, 90 % of which may be taken; a machine with 4 GiB free, all of which may."""
    stats = {"bytes_limit": 48 << 30, "bytes_in_use": 3 << 30}
    device = type("Device", (), {"memory_stats": lambda self: stats})()
    monkeypatch.setattr(sizing.jax, "default_backend", lambda: platform)
    monkeypatch.setattr(sizing.jax, "local_devices", lambda: [device])
    monkeypatch.setattr(sizing, "free_memory", lambda: (free << 30, 64 << 30))
    share = 1.0 if platform == "cpu" else None
    plain, beside = default_kv_memory(1, share), default_kv_memory(1, share, less=5 << 29)
    assert plain == (4 << 30 if platform == "cpu" else 39 << 30)  # 43.2 - 3 - 1 of reserve, in whole quarters
    assert beside == (1 << 30 if platform == "cpu" else 73 << 29)
