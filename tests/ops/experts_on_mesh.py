"""Run as a process of its own, which makes four CPU devices: int8 experts split over them against all on one.

Prints the largest difference over the largest value.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ops.experts import experts
from ops.linear import quantize
from sharding.mesh import make_mesh

E, D, F, T, K, SHARDS = 4, 32, 16, 9, 2, 2


def activation(gate_up_MJ: jax.Array) -> jax.Array:
    gate, up = jnp.split(gate_up_MJ, 2, -1)
    return jax.nn.silu(gate) * up


def by_shard(rows_EJ: np.ndarray) -> np.ndarray:
    """Rows gate, then up -> each shard's part of the gate, then its part of up."""
    parts = rows_EJ.reshape(E, 2, SHARDS, F // SHARDS, *rows_EJ.shape[2:])
    return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(rows_EJ.shape)


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = make_mesh(f"expert=2,model={SHARDS}")
    rng = np.random.default_rng(0)
    shapes = ((E, 2 * F, D), (E, D, F), (E, 2 * F), (E, D), (T, D), (T, K))
    up, down, up_bias, down_bias, x, weights = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
    ids = np.stack([rng.choice(E, K, replace=False) for _ in range(T)]).astype(np.int32)

    def put(array: np.ndarray, *axes: str | None) -> jax.Array:
        return jax.device_put(array, NamedSharding(mesh, PartitionSpec(*axes)))

    biases = {"gate_up_bias_EJ": up_bias, "down_bias_ED": down_bias}
    alone = experts(x, ids, weights, *(quantize(jnp.asarray(w), "int8") for w in (up, down)), activation, **biases)
    split = (
        quantize(put(by_shard(up), "expert", "model"), "int8"),
        quantize(put(down, "expert", None, "model"), "int8"),
    )
    assert split[0].values_OI.sharding.spec == PartitionSpec("expert", "model")
    biases = {"gate_up_bias_EJ": put(by_shard(up_bias), "expert", "model"), "down_bias_ED": put(down_bias, "expert")}
    run = jax.jit(
        lambda *a: experts(*a, activation, mesh=mesh, expert_axis="expert", model_axis="model", **biases),
    )
    together = run(x, ids, weights, *split)
    print(float(np.abs(np.asarray(alone) - np.asarray(together)).max() / np.abs(np.asarray(alone)).max()))


if __name__ == "__main__":
    main()
