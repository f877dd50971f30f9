"""The GPU kernels lowered for CUDA, which needs no GPU; and compiled for one, where JAX's CUDA plugin is installed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops import paged_attention
from ops.linear import linear
from ops.linear.kernels.coding import Coding
from ops.linear.weights.grouped import GroupedWeight
from ops.paged_attention import pages
from ops.paged_attention.batch import AttentionBatch, KVSpec
from serving.plan import chips, topology

# Later versions want to know the GPU before they lower for one; test_compiles_in_place tells them.
needs_lowering = pytest.mark.skipif(
    jax.__version_info__ > (0, 10, 2), reason="this version of JAX lowers Pallas for a GPU that it knows alone"
)
KERNELS = ("paged_attention_write", "paged_attention", "paged_attention_combine")


@dataclasses.dataclass(frozen=True)
class Shape:
    K: int
    G: int
    h: int
    v: int
    dtype: str
    activations: str = "bfloat16"
    options: tuple[tuple[str, object], ...] = ()
    sinks: bool = False


SHAPES = {
    "llama": Shape(8, 4, 128, 128, "bfloat16"),
    "smollm": Shape(3, 3, 64, 64, "bfloat16", options=(("window", 128), ("softcap", 20.0)), sinks=True),
    "int8": Shape(2, 4, 128, 128, "int8"),
    "fp8": Shape(4, 4, 128, 128, "float8_e4m3fn"),
    "latent": Shape(1, 16, 576, 0, "bfloat16"),
    "latent_int8": Shape(1, 128, 576, 0, "int8"),
    "wide_head": Shape(1, 8, 256, 256, "bfloat16"),
    "odd_head": Shape(2, 7, 80, 80, "float16", "float16"),
    "float32": Shape(2, 4, 64, 64, "float32", "float32"),
}


def arguments(shape: Shape, place=None, B=8, C=128, R=2, P=32):
    """(q, k, v, kv, batch, sinks) without content."""

    def array(dtype, *dims):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    spec = KVSpec(shape.K, shape.h, shape.v)
    kv = jax.eval_shape(lambda: pages.allocate(spec, 5000, 16, shape.dtype, None, "rows"))
    kv = jax.tree.map(lambda leaf: array(leaf.dtype, *leaf.shape), kv)
    kv = dataclasses.replace(kv, platform="gpu")
    T, i = B + C, jnp.int32
    batch = AttentionBatch(
        array(i, T), array(i, B, P), array(i, B), array(i, R, P), array(i, R), array(i, R), array(i, R),
        array(i, C // 16),
    )  # fmt: skip
    q = array(shape.activations, T, shape.K, shape.G, shape.h)
    k = array(shape.activations, T, shape.K, shape.h)
    v = array(shape.activations, T, shape.K, shape.v) if shape.v else None
    return q, k, v, kv, batch, array(jnp.float32, shape.K, shape.G) if shape.sinks else None


def step_of(shape: Shape):
    def step(q, k, v, kv, batch, sinks):
        return paged_attention.attend(q, k, v, kv, batch, scale=0.1, sinks_KG=sinks, **dict(shape.options))

    return jax.jit(step, donate_argnums=3)


@needs_lowering
@pytest.mark.parametrize("name", SHAPES)
def test_gpu_gets_the_kernels_without_being_asked(name):
    shape = SHAPES[name]
    lowered = step_of(shape).trace(*arguments(shape)).lower(lowering_platforms=("cuda",))
    calls = [line for line in lowered.as_text().splitlines() if "triton" in line and "custom_call" in line]
    assert len(calls) == 4  # write; attend and combine for decode rows; attend for chunks
    found = [re.search(r'name = "(paged_attention\w*?)(?:__\d+)?"', line) for line in calls]
    assert {match[1] for match in found if match} == set(KERNELS)
    (write,) = [line for line in calls if 'name = "paged_attention_write' in line]
    held = len(jax.tree.leaves(arguments(shape)[3]))
    assert write.count("output_operand_alias<") == held  # pages, and scales where there are any, are written in place


@needs_lowering
def test_the_same_kernels_are_lowered_for_amd():
    shape = SHAPES["llama"]
    text = step_of(shape).trace(*arguments(shape)).lower(lowering_platforms=("rocm",)).as_text()
    assert all(f'name = "{kernel}' in text for kernel in KERNELS)


def test_xla_can_be_asked_for():
    shape = SHAPES["llama"]
    with paged_attention.use_backend("xla"):
        lowered = step_of(shape).trace(*arguments(shape)).lower(lowering_platforms=("cuda",))
    assert "triton" not in lowered.as_text()


@pytest.mark.skipif(
    not topology.gpu_compiler(), reason="JAX's CUDA plugin, which has the GPU compiler, is not installed"
)
@pytest.mark.parametrize("chip", ["a100:1", "h200:1"])
@pytest.mark.parametrize("name", SHAPES)
def test_compiles_in_place(name, chip):
    if chip.startswith("a100") and "fp8" in name:
        pytest.skip("sm_80 has no e4m3")
    shape = SHAPES[name]
    target = chips.parse_target(chip)
    topology.prepare([target])
    mesh = Mesh(np.array(topology.devices(target)), ("model",))
    q, k, v, kv, batch, sinks = arguments(shape, NamedSharding(mesh, PartitionSpec()))
    kv = dataclasses.replace(kv, mesh=mesh)
    compiled = step_of(shape).lower(q, k, v, kv, batch, sinks).compile()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held, "the program keeps a second copy of the pages"


E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
WEIGHTS = {
    "four": (4096, 6144, Coding(32, 32, 8), "int8", True),
    "awq": (8960, 1536, Coding(128, 64), "int8", True),
    "nvfp4": (2880, 2880, Coding(16, 16, table=E2M1), "int8", False),
    "six": (1536, 8960, Coding(16, zero=32), "int8", False),
    "fp8_blocks": (7168, 2112, Coding(128), "float8_e4m3fn", False),
    "fp8_rows": (14336, 4096, Coding(14336), "float8_e4m3fn", False),
}
"""Inputs, channels, coding, dtype of values, and whether there are offsets, as today's checkpoints have them."""


def weight_of(name: str, platform: str, place=None) -> GroupedWeight:
    """One of WEIGHTS without content."""
    I, O, coding, dtype, offsets = WEIGHTS[name]

    def array(kind, *dims):
        return jax.ShapeDtypeStruct(dims, kind, sharding=place)

    values = array(jnp.dtype(dtype), I // 2 if coding.half else I, O)
    scale = array(jnp.float32, I // coding.group, O)
    return GroupedWeight(values, scale, scale if offsets else None, None, coding, platform)  # pyright: ignore[reportArgumentType]


@needs_lowering
@pytest.mark.parametrize("rows", [1, 300])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_groups_are_multiplied_by_a_kernel(name, rows):
    made = weight_of(name, "gpu")
    x = jax.ShapeDtypeStruct((rows, made.shape[1]), jnp.bfloat16)
    for platform in ("cuda", "rocm"):
        text = jax.jit(linear).trace(x, made).lower(lowering_platforms=(platform,)).as_text()
        assert 'name = "grouped_product' in text
        assert f"{made.shape[1]}x{made.shape[0]}xbf16" not in text, "the whole weight is written out"


@pytest.mark.skipif(
    not topology.gpu_compiler(), reason="JAX's CUDA plugin, which has the GPU compiler, is not installed"
)
@pytest.mark.parametrize("chip", ["a100:1", "h200:1"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_groups_compile(name, chip):
    if chip.startswith("a100") and "fp8" in name:
        pytest.skip("sm_80 has no e4m3")
    target = chips.parse_target(chip)
    topology.prepare([target])
    here = NamedSharding(Mesh(np.array(topology.devices(target)), ("model",)), PartitionSpec())
    made = weight_of(name, "gpu", here)
    for rows in (1, 300):
        x = jax.ShapeDtypeStruct((rows, made.shape[1]), jnp.bfloat16, sharding=here)
        compiled = jax.jit(linear).lower(x, made).compile()
        dense_bytes = 2 * made.shape[0] * made.shape[1]
        assert compiled.memory_analysis().temp_size_in_bytes < dense_bytes, "the whole weight is written out"
