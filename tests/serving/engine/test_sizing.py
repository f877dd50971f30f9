"""What the engine chooses where the operator leaves it open."""

from __future__ import annotations

import dataclasses

import pytest

from ops import native
from ops.paged_attention import KVSpec
from serving.engine.config import EngineConfig
from serving.engine.sizing import resolve_kv_dtype


@dataclasses.dataclass
class Layers:
    """As much of a model as sizing looks at."""

    specs: tuple[KVSpec, ...]

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.specs


PLAIN = KVSpec(num_kv_heads=2, head_dim=64, v_head_dim=64)
ODD = KVSpec(num_kv_heads=2, head_dim=20, v_head_dim=20)  # no native kernel
vectorized = pytest.mark.skipif(
    not native.available() or native.isa() == "generic", reason="needs vectorized native kernels"
)


def kv_dtype(specs=(PLAIN,), devices=1, **options):
    """For a model that computes in float32."""
    return resolve_kv_dtype(EngineConfig(**options), Layers(specs), "float32", devices)  # pyright: ignore[reportArgumentType]


@vectorized
def test_pages_are_bfloat16_beside_int8_weights():
    assert kv_dtype() == "bfloat16"
    assert kv_dtype(quantization="int8") == "bfloat16"


@vectorized
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "float32"},
        {"dtype": "float32", "quantization": "int8"},
        {"quantization": "none"},
        {"devices": 2},
        {"specs": (PLAIN, ODD)},
        {"attention_backend": "xla"},
    ],
)
def test_pages_follow_the_compute_dtype_otherwise(options):
    assert kv_dtype(**options) == "float32"


def test_what_is_asked_for_is_taken():
    assert kv_dtype(kv_cache_dtype="int8") == "int8"
    assert kv_dtype(kv_cache_dtype="float32") == "float32"


def test_without_native_kernels_pages_are_float32(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    assert kv_dtype() == "float32"
