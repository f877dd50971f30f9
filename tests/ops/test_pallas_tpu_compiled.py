"""The TPU kernels compiled by the real TPU compiler, for chips that are not here. Skipped where libtpu is not installed.

libtpu is not in the test group: it is 700 MB, and where it lies beside jax every start of jax looks for a TPU. Put it
apart: `pip install --no-deps --target DIR libtpu`, then TPU_LIBRARY_PATH=DIR/libtpu/libtpu.so.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ops import paged_attention
from ops.linear import linear
from ops.linear.weights.group_pack import place
from ops.paged_attention import pages
from ops.paged_attention.batch import AttentionBatch, KVSpec
from serving.plan import chips, topology
from tests.ops.test_pallas_gpu_lowered import WEIGHTS, weight_of

pytestmark = pytest.mark.skipif(
    not topology.tpu_compiler(), reason="libtpu, which has the TPU compiler, is not installed"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    K: int
    G: int
    h: int
    v: int
    page_size: int
    dtype: str
    options: tuple[tuple[str, object], ...] = ()
    beside: tuple[int, int] | None = None  # heads of the other kind in the array


SHAPES = {
    "llama": Shape(8, 4, 128, 128, 16, "bfloat16"),
    "smollm": Shape(3, 3, 64, 64, 16, "bfloat16", (("window", 128), ("softcap", 20.0))),
    "int8": Shape(2, 4, 128, 128, 128, "int8"),
    "fp8": Shape(4, 4, 128, 128, 32, "float8_e4m3fn"),
    "latent": Shape(1, 16, 576, 0, 64, "bfloat16"),
    "shared": Shape(2, 8, 512, 512, 16, "bfloat16", beside=(8, 256)),  # Gemma 4 26B-A4B
    "shared_int8": Shape(2, 8, 512, 512, 128, "int8", beside=(8, 256)),
}
PAIRS = [("v5e:2x2", name) for name in SHAPES] + [
    (chip, name) for chip in ("v5p:2x2x1", "v6e:2x2") for name in ("llama", "int8")
]


@pytest.mark.parametrize("chip,name", PAIRS)
def test_compiles_in_place(chip, name):
    shape = SHAPES[name]
    target = chips.parse_target(chip)
    topology.prepare([target])
    mesh = Mesh(np.array(topology.devices(target)[:1]), ("model",))
    here = NamedSharding(mesh, PartitionSpec())
    own = spec = KVSpec(shape.K, shape.h, shape.v)
    if shape.beside is not None:
        K, h = shape.beside
        (spec,) = paged_attention.KVGroups.of([KVSpec(K, h, h, 1024), own, own], 1).arrays
    kv = jax.eval_shape(lambda: pages.allocate(spec, 500, shape.page_size, shape.dtype, None, "lanes"))
    kv = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), kv)
    kv = paged_attention.layer_pages(dataclasses.replace(kv, mesh=mesh, platform="tpu"), own, 1)

    def ints(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.int32, sharding=here)

    def floats(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=here)

    B, C, R, P = 8, 128, 2, 32
    T = B + C
    batch = AttentionBatch(ints(T), ints(B, P), ints(B), ints(R, P), ints(R), ints(R), ints(R), ints(C // 16))
    v = floats(T, shape.K, shape.v) if shape.v else None

    def step(q, k, v, kv, batch):
        return paged_attention.attend(q, k, v, kv, batch, scale=0.1, **dict(shape.options))

    with paged_attention.use_backend("pallas_tpu"):
        lowered = jax.jit(step, donate_argnums=3).lower(
            floats(T, shape.K, shape.G, shape.h), floats(T, shape.K, shape.h), v, kv, batch
        )
        compiled = lowered.compile()
    assert compiled.as_text().count("tpu_custom_call") >= 4  # write and attend, for decode rows and for chunks
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kv))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= held
    assert memory.temp_size_in_bytes < held, "the program keeps a second copy of the pages"


@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_in_groups(chip, name):
    """Read in few bits, and never written out."""
    target = chips.parse_target(chip)
    topology.prepare([target])
    here = NamedSharding(Mesh(np.array(topology.devices(target)[:1]), ("model",)), PartitionSpec())
    made = place(weight_of(name, "tpu"), here)
    for rows in (1, 300) if chip.startswith("v5e") else (16,):
        x = jax.ShapeDtypeStruct((rows, made.shape[1]), jnp.bfloat16, sharding=here)
        compiled = jax.jit(linear).lower(x, made).compile()
        assert "tpu_custom_call" in compiled.as_text()
        assert compiled.memory_analysis().temp_size_in_bytes < made.values.size // 4
