import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from sharding.rules import DEFAULT_RULES, ShardingRules, num_shards, to_sharding


@pytest.fixture
def mesh():
    grid = np.array(jax.devices()[:1]).reshape(1, 1, 1)
    return Mesh(grid, ("data", "model", "expert"), axis_types=(AxisType.Auto,) * 3)


def test_logical_axes_become_mesh_axes(mesh):
    assert to_sharding(mesh, ("vocab", "embed")).spec == PartitionSpec("model", None)
    assert to_sharding(mesh, ("experts", "ffw", None)).spec == PartitionSpec("expert", "model", None)
    assert to_sharding(mesh, ()).spec == PartitionSpec()


def test_collisions_and_unknown_axes_raise(mesh):
    with pytest.raises(ValueError, match="collide"):
        to_sharding(mesh, ("ffw", "kv_heads"))
    with pytest.raises(ValueError, match="'feet' is not a logical axis"):
        to_sharding(mesh, ("feet",))
    with pytest.raises(ValueError, match="'stage'"):
        to_sharding(mesh, ("ffw",), ShardingRules(ffw="stage"))


def test_num_shards(mesh):
    assert num_shards(None, "ffw") == 1
    assert num_shards(mesh, "ffw") == 1
    assert DEFAULT_RULES.mesh_axis("embed") is None
