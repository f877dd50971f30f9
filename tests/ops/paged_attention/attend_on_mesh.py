"""Run as a process of its own, which makes two CPU devices: attention whose KV heads are split over them.

Prints for each body ("native" where it is to be had, and "xla") its name and the largest difference from one device.
"""

import functools

import jax
import numpy as np

from ops import native, paged_attention
from ops.paged_attention.cases import TEST_CASES, make_arguments
from tests.ops.paged_attention.against_reference import fill, run


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("model",))
    case = TEST_CASES["mixed"]
    arguments = make_arguments(case, leftovers=0.0)
    arguments.history_k[:], arguments.history_v[:] = 0, 0
    want = run("xla", arguments, fill(case, arguments, np.float32, "rows"))[0]
    options = {name: value for name, value in arguments.options.items() if name != "sinks_KG"}
    operands = arguments.q_TKGh, arguments.k_TKh, arguments.v_TKh
    for backend in (["native"] if native.available() else []) + ["xla"]:
        with paged_attention.use_backend(backend):
            kv = paged_attention.allocate(case.spec, len(arguments.history_k), case.page_size, np.float32, mesh)
            assert kv.k.sharding.shard_shape(kv.k.shape)[1] == case.num_kv_heads // 2, (
                "a device holds its own heads' pages"
            )
            step = jax.jit(functools.partial(paged_attention.attend, **options), donate_argnums=3)
            program = step.lower(*operands, kv, arguments.batch).compile()
            assert "all-" not in program.as_text(), "attention needs no communication"
            out, _ = step(*operands, kv, arguments.batch)
        print(backend, float(np.abs(np.asarray(out) - want).max()))


if __name__ == "__main__":
    main()
