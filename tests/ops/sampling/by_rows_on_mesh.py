"""Run as a process of its own, which makes four CPU devices: rows shared out between them against all on one.

Prints a JSON object: "rows x vocabulary" -> [the largest difference, the collectives of the program by kind].
"""

import collections
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ops.sampling import by_rows
from sharding.mesh import make_mesh

SHAPES = [
    (1, 64),
    (3, 64),
    (4, 64),
    (9, 64),
    (5, 63),
]  # fewer rows than devices, not a multiple; a vocabulary that is none


def function(logits_RV: jax.Array, rows: dict[str, jax.Array], offset: jax.Array) -> tuple[jax.Array, ...]:
    scaled_RV = logits_RV * rows["scale_R"][:, None] + offset
    values_R2, ids_R2 = jax.lax.top_k(scaled_RV, 2)
    return jnp.sum(scaled_RV, axis=-1), ids_R2.astype(jnp.int32), values_R2


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)
    mesh = make_mesh("model=4")
    rng = np.random.default_rng(0)
    found = {}
    for rows, vocab in SHAPES:
        logits_RV = rng.standard_normal((rows, vocab)).astype(np.float32)
        given = {"scale_R": rng.standard_normal(rows).astype(np.float32)}
        wanted = function(jnp.asarray(logits_RV), given, jnp.float32(3))
        place = NamedSharding(mesh, PartitionSpec(None, "model" if vocab % 4 == 0 else None))
        arguments = (jax.device_put(logits_RV, place), given, np.float32(3))
        program = jax.jit(lambda *a: by_rows(function, mesh, *a)).lower(*arguments).compile()
        got = program(*arguments)
        worst = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(wanted, got, strict=True))
        kinds = re.findall(r" (all-[a-z-]+|collective-permute|reduce-scatter)\(", program.as_text())
        found[f"{rows} x {vocab}"] = [worst, collections.Counter(kinds)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
