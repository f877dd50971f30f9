"""Gradients on meshes of CPU devices against one device's: prints what -> mesh -> the largest difference, as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time

import numpy as np  # noqa: E402

from models.recipes import given_back  # noqa: E402
from tests.serving.training.test_network import LORA, with_b  # noqa: E402
from tests.serving.training.tiny import Bench, examples, make_model, pack  # noqa: E402

MESHES = ("data=2", "model=2")
MODELS = {
    "lora, heads spread": ("llama, biases, 9 heads", LORA),
    "full": ("llama", None),
    "experts": ("mixtral", None),
}


def main(root: Path) -> None:
    results: dict[str, dict[str, float]] = {}
    rows = pack(examples(6), 96)
    call = np.array([*range(len(rows)), -1, -1, -1, -1][:4])
    for what, (name, lora) in MODELS.items():
        if not (root / name).exists():
            make_model(name, root / name)

        def gradients(mesh: str | None, name: str = name, lora: Any = lora) -> dict[str, np.ndarray]:
            bench = Bench(root / name, rows, lora, mesh=mesh)
            if lora is not None:
                with_b(bench)
            found, loss = bench.gradients(call)
            if lora is None:  # by the checkpoint's tensors: a mesh lays gate and up out in its own way
                recipes = bench.recipes
                arrays = given_back(
                    (recipes[path], np.asarray(x)) for path, x in found.items() if recipes[path].by_rows
                )
            else:
                arrays = {f"{path}.{part}": np.asarray(x) for path, pair in found.items() for part, x in pair.items()}
            return arrays | {"loss": np.asarray(loss)}

        expected = gradients(None)
        results[what] = {}
        for mesh in MESHES:
            found = gradients(mesh)
            results[what][mesh] = max(float(np.abs(found[n] - x).max()) for n, x in expected.items())
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
