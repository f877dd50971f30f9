"""Checkpoints of our own: a directory with the configuration, the tokenizer's files, and the arrays as Orbax keeps them.

Arrays are stored under our parameter paths in our layout, so that each device reads its shards and nothing is
assembled: loading runs at the disk's speed when the mesh cuts the model as it was cut when saved.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from models.layers import Build, Weight
from models.loading.source import MANIFEST
from sharding.rules import to_sharding

FORMAT = 1
ARRAYS = "arrays"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip

POOLING_FILES = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
"""What sentence-transformers says of an embedding model."""


def save(
    directory: Path,
    parameters: dict[str, Weight],
    *,
    model_id: str,
    hf_config: dict[str, Any],
    generation_config: dict[str, Any],
    tokenizer_from: Path | None = None,
) -> None:
    """Writes a checkpoint directory.

    Args:
        directory: must not exist.
        parameters: dense ones, on their devices.
        tokenizer_from: a directory whose tokenizer files, and what it says of embeddings, are copied.
    Raises:
        ValueError: the directory exists, or a parameter is quantized.
    """
    if directory.exists():
        raise ValueError(f"{directory} exists already; give a directory that does not.")
    arrays = {path: parameter.get_value() for path, parameter in parameters.items()}
    for path, value in arrays.items():
        if not isinstance(value, jax.Array):
            raise ValueError(f"the parameter {path} is quantized; only dense models are saved.")
        if parameters[path].stored_shape != tuple(value.shape):
            raise ValueError(
                f"the parameter {path} is spread over a mesh that does not divide its heads; save without one."
            )
    import orbax.checkpoint as ocp  # 0.3 s, which every start would pay

    directory.mkdir(parents=True)
    # Not compressed: bfloat16 weights shrink by a fifth only, and reading them back takes 2.7 times as long.
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(directory.resolve() / ARRAYS, arrays)
    if tokenizer_from is not None:
        for name in (*TOKENIZER_FILES, *POOLING_FILES):
            if (tokenizer_from / name).exists():
                (directory / name).parent.mkdir(exist_ok=True)
                shutil.copy(tokenizer_from / name, directory / name)
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2), encoding="utf-8")
    (directory / "generation_config.json").write_text(json.dumps(generation_config, indent=2), encoding="utf-8")
    layouts = {path: layout for path, parameter in parameters.items() if (layout := gate_layout(parameter))}
    manifest = {"format": FORMAT, "model_id": model_id, "gate_shards": {path: s for path, (_, s) in layouts.items()}}
    # Last: a directory without it is not taken for a checkpoint.
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `save` noted.

    Raises:
        ValueError: written by another version.
    """
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{directory} is written in format {manifest.get('format')!r}; this version reads format {FORMAT}. "
            "Convert the original checkpoint again."
        )
    return manifest


def restore(directory: Path, parameters: dict[str, Weight], build: Build) -> dict[str, jax.Array]:
    """Every parameter's array, on its devices, in the parameter's dtype.

    Raises:
        ValueError: a missing, extra or wrongly shaped parameter, by name.
    """
    import orbax.checkpoint as ocp

    manifest = read_manifest(directory)
    path = directory.resolve() / ARRAYS
    with ocp.StandardCheckpointer() as checkpointer:
        stored = dict(checkpointer.metadata(path).item_metadata)
        if stored.keys() != parameters.keys():
            missing, extra = sorted(parameters.keys() - stored.keys()), sorted(stored.keys() - parameters.keys())
            raise ValueError(f"{directory} does not fit its configuration: missing {missing[:3]}, extra {extra[:3]}.")
        wanted: dict[str, jax.ShapeDtypeStruct] = {}
        for name, parameter in parameters.items():
            target = parameter.get_value()
            if tuple(stored[name].shape) != parameter.stored_shape:
                raise ValueError(
                    f"{directory}: the parameter {name} has the shape {list(stored[name].shape)}; the configuration "
                    f"calls for {list(parameter.stored_shape)}."
                )
            sharding = _sharding(parameter, build)
            if parameter.stored_shape != tuple(target.shape):  # heads that are spread after reading
                sharding = SingleDeviceSharding(jax.devices()[0])
            wanted[name] = jax.ShapeDtypeStruct(parameter.stored_shape, target.dtype, sharding=sharding)
        arrays = checkpointer.restore(path, wanted)
    for name, parameter in parameters.items():
        if parameter.stored_shape != tuple(parameter.shape):
            arrays[name] = jax.device_put(parameter.from_stored(np.asarray(arrays[name])), _sharding(parameter, build))
        layout = gate_layout(parameter)
        saved = manifest["gate_shards"].get(name)
        if layout and saved != layout[1]:
            relaid = _relay(np.asarray(arrays[name]), layout[0], saved, layout[1])
            arrays[name] = jax.device_put(relaid, _sharding(parameter, build))
    return arrays


def _sharding(parameter: Weight, build: Build) -> Any:
    if build.mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    sharding: NamedSharding = to_sharding(build.mesh, parameter.get_metadata()["logical_axes"], build.rules)
    return sharding


def gate_layout(parameter: Weight) -> tuple[int, int] | None:
    """(axis, S) of a parameter that holds gate and up interleaved in S pieces along an axis; None for others."""
    return parameter.get_metadata().get("gate_shards")


def _relay(array: np.ndarray, axis: int, saved: int, wanted: int) -> np.ndarray:
    """[.., S, 2, F / S, ..] from one S to another."""
    width = array.shape[axis] // 2
    before, after = array.shape[:axis], array.shape[axis + 1 :]
    split = array.reshape(*before, saved, 2, width // saved, *after)
    gate_first = np.moveaxis(split, axis + 1, axis).reshape(*before, 2, wanted, width // wanted, *after)
    return np.moveaxis(gate_first, axis, axis + 1).reshape(array.shape)
