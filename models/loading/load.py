"""From a checkpoint to a module whose parameters are on the devices."""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from models.embedding_head import EmbeddingHead
from models.layers import Build, Weight
from models.loading import orbax
from models.loading.coded import coded, in_groups
from models.loading.files.checkpoint import Checkpoint
from models.loading.gguf.checkpoint import GGUFCheckpoint
from models.loading.gguf.file import split_paths
from models.loading.kept.cache import WeightCache
from models.loading.opening import Opened, open_checkpoint
from models.loading.source import ModelSource, resolve
from models.loading.traced import compare
from models.parameters import finer, parameters_of, rounded_by, tables
from models.recipes import Recipe, Recipes
from ops import buffers
from ops.buffers import owned
from ops.experts import pack_experts
from ops.linear import SCHEMES, StoredWeight, host_pack, pack, quantize
from ops.linear.weights import group_pack
from ops.linear.weights import grouped as grouped_weights
from ops.linear.weights.base import single_cpu
from ops.linear.weights.block_round import Finer, eight_bits, four_bits
from ops.linear.weights.group_pack import place as place_groups
from ops.linear.weights.grouped import GroupedWeight
from sharding.rules import to_sharding

__all__ = ["LoadedModel", "ModelSource", "load_model", "resolve"]

T = TypeVar("T")
log = logging.getLogger(__name__)

IGNORED = (
    r"rotary_emb\.(original_)?inv_freq$",
    r"rotary_emb\.(cos|sin)_cached$",
    r"^rope_(freqs|factors_(long|short))\.weight$",
    r"\.attention\.(masked_)?bias$",
    r"\.(?:[kqv]|prob|kv)_scale$",
    r"(^|\.)position_ids$",
    r"\._extra_state$",
)
"""Tensors of any checkpoint that hold no weights: tables that are computed or read with the configuration, and how a cache of
eight bits would be scaled."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model on its devices.

    Attributes:
        model: an `nnx.Module` that is a `models.api.CausalLM`.
        config: its `ModelConfig`.
        model_id: its own name.
        generation_config: what its authors say of sampling and of the token ids that begin and end; may be empty.
        source: where it came from (the tokenizer is there too).
        embedding: how it makes embeddings.
    """

    model: Any
    config: Any
    model_id: str
    generation_config: dict[str, Any]
    source: ModelSource
    embedding: EmbeddingHead


@dataclasses.dataclass(frozen=True)
class Built:
    """A model before its weights: every parameter is a shape and a place.

    Attributes:
        model: as `LoadedModel.model`.
        config: its `ModelConfig`.
    """

    model: Any
    config: Any
    build: Build


def build_model(
    opened: Opened, *, dtype: Any = jnp.float32, mesh: Mesh | None = None, max_model_len: int | None = None
) -> Built:
    """The module that a checkpoint's configuration describes; the arguments are those of `load_model`."""
    config = opened.family.config(opened.hf_config)
    on_cpu = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform == "cpu"
    build = Build(
        dtype=jnp.dtype(dtype),
        compute_dtype=jnp.float32 if on_cpu else jnp.dtype(dtype),
        mesh=mesh,
        max_model_len=max_model_len or config.max_positions,
    )
    return Built(opened.family.build(config, build), config, build)


def load_model(
    source: ModelSource,
    *,
    dtype: Any = jnp.float32,
    mesh: Mesh | None = None,
    quantization: str | None = None,
    max_model_len: int | None = None,
    progress: bool = True,
    opened: Opened | None = None,
    built: Built | None = None,
    kept: WeightCache | None = None,
) -> LoadedModel:
    """Loads a checkpoint tensor by tensor; the host never holds more than a few of them.

    Args:
        dtype: of the weights. Activations have it too, except on CPU, where they are float32.
        mesh: where the weights go; None for the default device.
        quantization: a scheme of `ops.linear.quantize` for every Linear (with "int4" and "stored" what the checkpoint stores in
            blocks stays so, bit for bit, where native kernels run); None keeps `dtype`.
        max_model_len: the longest context to serve; None for what the checkpoint claims.
        progress: show a bar.
        opened: what `open_checkpoint` gave, where that was called before.
        built: what `build_model` gave with the same arguments, where that was called before; it becomes the loaded model.
        kept: where converted weights are looked for, and kept for the next time: of one CPU device alone.
    Raises:
        ValueError: an unsupported architecture, a damaged file, or a missing, extra or wrongly shaped tensor, by name.
    """
    opened = opened or open_checkpoint(source)
    built = built or build_model(opened, dtype=dtype, mesh=mesh, max_model_len=max_model_len)
    model, config, build = built.model, built.config, built.build
    if opened.family.traced:
        compare(opened, in_float32)
    if opened.checkpoint is None:
        arrays = orbax.restore(source.path, dict(parameters_of(model)), build)
        set_values(model, arrays.items(), quantization=quantization, progress=progress)
    else:
        if kept is not None and (found := load_kept(opened, built, quantization, kept)) is not None:
            return found
        # Layers behind the last one predict further tokens (DeepSeek-V3's MTP); they are drafts, not the model.
        behind = range(config.num_layers, config.num_layers + (opened.hf_config.get("num_nextn_predict_layers") or 0))
        ignore = (*opened.family.ignore, *(rf"^(?:model\.layers|blk)\.{layer}\." for layer in behind))
        ignore += getattr(model, "unused", ())
        shapes = {} if kept is None else _shapes(dict(parameters_of(model)))  # which filling changes
        fill(model, opened.checkpoint, build, ignore=ignore, quantization=quantization, progress=progress)
        if kept is not None and (key := _key(kept, opened, build, quantization, shapes)) is not None:
            kept.keep(key, {path: parameter.get_value() for path, parameter in parameters_of(model)})
    return _loaded(opened, built)


def load_kept(opened: Opened, built: Built, quantization: str | None, kept: WeightCache) -> LoadedModel | None:
    """A checkpoint whose weights were converted before: only its files' sizes and times are looked at, and what is kept of them
    is mapped. None where nothing is kept of it as it is now.

    Args:
        opened, built, quantization: as for `load_model`.
    """
    parameters = dict(parameters_of(built.model))
    key = _key(kept, opened, built.build, quantization, _shapes(parameters))
    found = None if key is None else kept.read(key)
    if found is None or found.keys() != parameters.keys():
        return None
    for path, value in _placed(found, parameters, built.build):
        parameters[path].set_value(value)
    return _loaded(opened, built)


def _loaded(opened: Opened, built: Built) -> LoadedModel:
    head = opened.embedding
    return LoadedModel(built.model, built.config, opened.model_id, opened.generation_config, opened.source, head)


def _on_one_cpu(build: Build) -> bool:
    devices = [jax.devices()[0]] if build.mesh is None else list(build.mesh.devices.flat)
    return len(devices) == 1 and devices[0].platform == "cpu"


def _shapes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {
        path: [list(parameter.get_value().shape), str(parameter.get_value().dtype)]
        for path, parameter in parameters.items()
    }


def weight_files(source: ModelSource) -> list[Path]:
    """The files of a checkpoint that decide its weights."""
    if source.kind == "gguf":
        return split_paths(source.path)
    return sorted(file for file in source.path.iterdir() if file.suffix in (".json", ".safetensors"))


def _key(
    kept: WeightCache, opened: Opened, build: Build, quantization: str | None, shapes: Mapping[str, Any]
) -> str | None:
    """What the model's weights are kept under; None where that saves nothing: they go to other devices, or are in the file as
    they are in memory."""
    converted = quantization is not None or opened.source.kind == "gguf" or "quantization_config" in opened.hf_config
    if not converted or opened.checkpoint is None or not _on_one_cpu(build):
        return None
    return kept.key(weight_files(opened.source), {"quantization": quantization, "parameters": shapes})


def _placed(
    found: Mapping[str, np.ndarray | StoredWeight], parameters: Mapping[str, Any], build: Build
) -> Iterator[tuple[str, jax.Array | StoredWeight]]:
    """Host arrays of one CPU's weights on it, without a copy."""
    sharding = None if build.mesh is None else NamedSharding(build.mesh, PartitionSpec())
    for path, host in found.items():
        if isinstance(host, StoredWeight):
            yield path, jax.device_put(host, sharding)
        else:
            yield path, place(host, host.dtype, parameters[path], build)


def in_float32(opened: Opened, max_model_len: int) -> Any:
    """A model as its checkpoint has it, on one device."""
    built = build_model(opened, max_model_len=max_model_len)
    assert opened.checkpoint is not None
    fill(built.model, opened.checkpoint, built.build, ignore=opened.family.ignore, progress=False)
    return built.model


def fill(
    model: Any,
    checkpoint: Checkpoint,
    build: Build,
    *,
    ignore: tuple[str, ...] = (),
    quantization: str | None = None,
    progress: bool = True,
) -> None:
    """Puts every parameter of an abstract model on its devices.

    Raises:
        ValueError: as `load_model`; all tensors are checked before the first is read.
    """
    recipes: Recipes = model.recipes()
    parameters = dict(parameters_of(model))
    assert recipes.keys() == parameters.keys(), f"recipes do not match: {recipes.keys() ^ parameters.keys()}"
    if getattr(model, "head", None) is None:
        ignore = (*ignore, r"^(lm_head|output)\.weight$")
    check_tensors(recipes, checkpoint, ignore)

    on_cpu, platform = _on_one_cpu(build), _platform(build)
    narrow, six = rounded_by(model, quantization), finer(model) if quantization == "int4" else {}
    grouped = quantization in ("int4", "stored") and platform in grouped_weights.PLATFORMS
    packs = on_cpu and quantization in SCHEMES and host_pack.available()
    in_blocks: set[str] = set()
    if packs:  # without kernels blocks would be whole on each device, and dense for each product
        # A table that is only looked up stays as it is stored under every scheme: exact, and a seventh of its float32.
        in_blocks = set(tables(model)) - narrow if quantization == "int8" else set(tables(model)) | narrow

    def make(path: str) -> np.ndarray | StoredWeight:
        recipe, parameter = recipes[path], parameters[path]
        if grouped and path in narrow:
            weight = _in_groups(recipe, parameter, checkpoint, build, 8 if path in six else 4, quantization == "int4")
            if weight is not None:
                for piece in recipe.pieces:
                    checkpoint.release(piece.name)
                return weight
        stored = coded(recipe, parameter, checkpoint) if path in in_blocks else None
        if stored is not None:
            for piece in recipe.pieces:
                checkpoint.release(piece.name)
            return stored
        host = parameter.from_stored(recipe.make(checkpoint.read))
        if packs and path in narrow and _is_packed(parameter, host, quantization):
            packed = _packed(host, quantization, six.get(path))
            for piece in recipe.pieces:
                checkpoint.release(piece.name)
            return packed
        dtype = parameter.get_value().dtype
        if not on_cpu or (path in narrow and host.dtype.itemsize < dtype.itemsize):
            dtype = host.dtype  # devices cast faster than the host, and quantizing widens by itself
        host = owned(host, dtype)
        for piece in recipe.pieces:
            checkpoint.release(piece.name)
        return host

    def placed() -> Iterator[tuple[str, jax.Array | StoredWeight]]:
        for path, host in _read_ahead(recipes, make):
            if isinstance(host, GroupedWeight):
                yield path, place_groups(host, _sharding(parameters[path], build))
                continue
            if isinstance(host, StoredWeight):
                yield (
                    path,
                    jax.device_put(host, None if build.mesh is None else NamedSharding(build.mesh, PartitionSpec())),
                )
                continue
            dtype = host.dtype if path in narrow else parameters[path].get_value().dtype
            yield path, place(host, dtype, parameters[path], build)

    # What is not in groups beside those that are stays as it is.
    set_values(model, placed(), quantization=None if grouped else quantization, progress=progress)


def _platform(build: Build) -> str:
    return jax.default_backend() if build.mesh is None else build.mesh.devices.flat[0].platform


def _sharding(parameter: Weight, build: Build) -> NamedSharding | None:
    axes = parameter.get_metadata()["logical_axes"]
    return None if build.mesh is None else to_sharding(build.mesh, axes, build.rules)


def _in_groups(
    recipe: Recipe, parameter: Weight, checkpoint: Checkpoint, build: Build, bits: int, rounds: bool
) -> GroupedWeight | None:
    """A weight for accelerators as the checkpoint stores it, of numpy arrays; rounded to so many bits where it is dense there and
    `rounds`. None where it must stay dense."""
    rows = in_groups(recipe, parameter, checkpoint)
    if rows is None and rounds:
        host = parameter.from_stored(recipe.make(checkpoint.read))
        rows = group_pack.rounded(host.reshape(-1, host.shape[-1]), bits)
    if rows is None:
        return None
    shape, sharding = tuple(parameter.shape), _sharding(parameter, build)
    device = jax.devices()[0] if build.mesh is None else build.mesh.devices.flat[0]
    if float(getattr(device, "compute_capability", 0) or 0) >= FLOAT8_SINCE:
        rows = group_pack.as_float8(rows)
    cuts = 1 if sharding is None else shape[-1] // sharding.shard_shape(shape)[-1]
    return rows.weight(shape, device.platform, cuts)


FLOAT8_SINCE = 8.9
"""Compute capability of NVIDIA's GPUs from which they turn float8 into wider floats by themselves; Hopper has no four bits."""


def set_values(
    model: Any,
    values: Iterable[tuple[str, jax.Array | StoredWeight]],
    *,
    quantization: str | None = None,
    progress: bool = True,
) -> None:
    """Gives every parameter its array, quantized where the scheme applies to it and that has not been done yet."""
    parameters = dict(parameters_of(model))
    quantized, six = rounded_by(model, quantization), finer(model) if quantization == "int4" else {}
    total = sum(int(np.prod(parameter.get_value().shape)) for parameter in parameters.values())
    with tqdm(total=total, unit=" weights", unit_scale=True, desc="Loading", disable=not progress) as bar:
        for path, value in values:
            size = int(np.prod(value.shape))
            if path in quantized and not isinstance(value, StoredWeight):
                value = _quantized(parameters[path], value, quantization, six.get(path))
            parameters[path].set_value(value)
            bar.update(size)


def _is_packed(parameter: Weight, value: Any, scheme: str | None) -> bool:
    """Whether a quantized weight has the layout of the CPU's kernels: matrices have, and experts that say so."""
    return value.ndim == 2 or bool(parameter.get_metadata().get("packed" if scheme == "int8" else "blocks"))


def _packed(host: np.ndarray, scheme: str | None, finer: Finer | None) -> StoredWeight:
    """A weight as a scheme stores it for the CPU's kernels, in memory that lasts, of numpy arrays; `finer` for "int4" alone.

    Experts of which a checkpoint has some in blocks and some not are all in blocks: kernels take gates, ups and downs of one type.
    """
    if host.dtype not in host_pack.SOURCES or not host.flags.c_contiguous:
        host = owned(host, np.float32)
    rows, empty = host.reshape(-1, host.shape[-1]), buffers.lasting.empty
    if scheme == "int4":
        return four_bits(rows, empty, finer)
    return eight_bits(rows, empty) if scheme == "stored" and host.ndim == 3 else host_pack.pack(rows, empty)


def _quantized(parameter: Weight, value: jax.Array, scheme: str | None, finer: Finer | None) -> Any:
    """The value as a scheme stores it, laid out for this machine."""
    if scheme in SCHEMES and single_cpu(value) and host_pack.available() and _is_packed(parameter, value, scheme):
        place = value.sharding
        place = NamedSharding(place.mesh, PartitionSpec()) if isinstance(place, NamedSharding) else place
        return jax.device_put(_packed(np.asarray(value), scheme, finer), place)
    weight = quantize(value, scheme)
    if value.ndim == 2:
        return pack(weight)
    return pack_experts(weight) if parameter.get_metadata().get("packed") else weight


def check_tensors(recipes: Recipes, checkpoint: Checkpoint, ignore: tuple[str, ...]) -> None:
    """Holds a checkpoint's headers against what a network needs.

    Args:
        ignore: regular expressions for tensors that nobody needs, besides those of IGNORED.
    Raises:
        ValueError: a missing, extra or wrongly shaped tensor, by name.
    """
    ignore = (*IGNORED, *ignore)
    used: set[str] = set()
    for path, recipe in recipes.items():
        for piece in recipe.pieces:
            own = checkpoint.locate(piece.name)
            if own is None:
                raise ValueError(f"the checkpoint has no tensor {piece.name!r}, which the parameter {path} needs.")
            found = checkpoint.shape(piece.name)
            if tuple(found) != tuple(piece.shape):
                raise ValueError(
                    f"the tensor {own!r} has the shape {list(found)}; the configuration calls for {list(piece.shape)}."
                )
            used.add(own)
    extra = sorted(name for name in checkpoint.own_names if name not in used)
    plain = {name: checkpoint.canonical(name) for name in (*extra, *used)}
    extra = [name for name in extra if not any(re.search(p, name) or re.search(p, plain[name]) for p in ignore)]
    if not isinstance(checkpoint, GGUFCheckpoint):
        # What hangs beside the network (a value head, a draft's layers, a tower of another sense) is no part of it. Inside of
        # it an unknown tensor means that the configuration says something else than the weights.
        inside = {plain[name].partition(".")[0] for name in used}
        beside = sorted({top for name in extra if (top := plain[name].partition(".")[0]) not in inside})
        if beside:
            log.warning("the checkpoint's %s: not a part of the network, not loaded.", ", ".join(beside))
        extra = [name for name in extra if plain[name].partition(".")[0] in inside]
    if extra:
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        raise ValueError(
            f"the checkpoint has tensors that the configuration has no place for: {', '.join(extra[:3])}{more}."
        )


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """Two threads for all loads of this process. glibc gives new threads one heap after the other, and each keeps up to 64 MiB of
    what its thread has freed: with threads of their own, loads of one model over and over grew a process to 16 times that."""
    return ThreadPoolExecutor(2, thread_name_prefix="load")


def _read_ahead(paths: Iterable[str], make: Callable[[str], T]) -> Iterator[tuple[str, T]]:
    """(path, its array), in the order in which they are done; two in the making at any time: as many as keep the memory busy."""
    pool, pending = _readers(), dict[Future[T], str]()
    try:
        for path in paths:
            pending[pool.submit(make, path)] = path
            while len(pending) > 3:
                yield from _finished(pending)
        while pending:
            yield from _finished(pending)
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _finished(pending: dict[Future[T], str]) -> Iterator[tuple[str, T]]:
    """Waits for one at least."""
    done, _ = wait(pending, return_when=FIRST_COMPLETED)
    for future in done:
        yield pending.pop(future), future.result()


def place(host: np.ndarray, dtype: Any, parameter: Weight, build: Build) -> jax.Array:
    """One array to its devices, sharded by the parameter's logical axes, as `dtype`.

    Args:
        host: from `buffers.owned`: on one CPU device the result is this memory, not a copy.
    """
    axes = parameter.get_metadata()["logical_axes"]
    if build.mesh is None:
        return jax.device_put(host).astype(dtype)
    sharding: NamedSharding = to_sharding(build.mesh, axes, build.rules)
    if build.mesh.size == 1:
        return jax.device_put(host, sharding).astype(dtype)
    array = jax.make_array_from_callback(host.shape, sharding, lambda index: np.ascontiguousarray(host[index]))
    return array.astype(dtype)
