"""Run as a process of its own, which makes four CPU devices: weights in groups that are cut, against all on one device."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from ops import native
from ops.experts import experts
from ops.linear import embed, linear
from ops.linear.weights import grouped
from ops.linear.weights.group_pack import place
from ops.linear.weights.grouped import BODIES, GroupedWeight, use_body
from sharding.mesh import make_mesh
from tests.models.loading.test_groups import KINDS, in_few_bits
from tests.ops.linear.test_grouped import RNG, rows_of, spelled_out


def check_products(mesh) -> None:
    for kind, group in (("four", 32), ("float8", 256), ("table", 16), ("eight", 128)):
        for axes in (("model", None), (None, "model"), (None, None)):
            rows = rows_of(kind, 64, 256, group)
            host = rows.weight((64, 256), "cpu", cuts=2 if axes[1] else 1)
            assert host is not None
            made = place(host, NamedSharding(mesh, PartitionSpec(*axes)))
            cut = 2 if any(axes) else 1
            assert made.values.addressable_shards[0].data.size * cut == made.values.size
            x_TI = RNG.standard_normal((5, 256)).astype(np.float32)
            for body in BODIES:
                with use_body(body):
                    got = jax.jit(lambda x, w: linear(x, w))(x_TI, made)  # noqa: PLW0108 (traced anew for each body)
                want = x_TI @ spelled_out(rows).T
                np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())
            np.testing.assert_array_equal(embed(made, jnp.array([3, 63])), spelled_out(rows)[[3, 63]])


def check_experts(mesh) -> None:
    E, D, F, T = 4, 64, 64, 7
    up, down = rows_of("four", E * F, D, 32), rows_of("eight", E * D, F, 16)
    x, ids = RNG.standard_normal((T, D)).astype(np.float32), RNG.integers(0, E, (T, 2)).astype(np.int32)
    weights = RNG.random((T, 2)).astype(np.float32)
    want = experts(
        x, ids, weights, jnp.asarray(spelled_out(up).reshape(E, F, D)), jnp.asarray(spelled_out(down).reshape(E, D, F)), jax.nn.silu
    )  # fmt: skip
    made = [
        place(rows.weight(shape, "cpu", cuts), NamedSharding(mesh, PartitionSpec(*axes)))
        for rows, shape, cuts, axes in (
            (up, (E, F, D), 1, ("expert", "model", None)),
            (down, (E, D, F), 2, ("expert", None, "model")),
        )
    ]
    got = experts(x, ids, weights, *made, jax.nn.silu, mesh=mesh, expert_axis="expert", model_axis="model")
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


def check_loading(mesh) -> None:
    for kind in KINDS:
        if kind == "int4" and not native.available():
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = resolve(str(in_few_bits(Path(folder) / "model", kind)))
            alone = load_model(source, progress=False, quantization="stored").model
            split = load_model(source, progress=False, quantization="stored", mesh=mesh).model
        for (path, one), (_, other) in zip(parameters_of(alone), parameters_of(split), strict=True):
            if "qkv" in path or not isinstance(one.get_value(), GroupedWeight):
                continue  # nine heads are spread over two devices by way of floats
            weight = other.get_value()
            assert isinstance(weight, GroupedWeight), path
            assert weight.values.addressable_shards[0].data.size * 2 == weight.values.size, path
            if "gate_up" not in path:  # whose rows lie by shards there
                np.testing.assert_array_equal(weight.dequantize(), one.get_value().dequantize())


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    grouped.PLATFORMS = ("cpu",)
    mesh = make_mesh("expert=2,model=2")
    check_products(mesh)
    check_experts(mesh)
    check_loading(make_mesh("data=1,model=2"))


if __name__ == "__main__":
    main()
