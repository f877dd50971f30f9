"""The server's own programs over arrays that have shapes and places but no content."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import registry
from models.config import ModelConfig
from models.layers import Build
from models.loading.load import parameters_of, quantizable
from ops import paged_attention
from ops.linear import quantize
from serving.engine.buckets import BucketTable
from serving.engine.compiling import Program
from serving.engine.executor import Executor
from serving.engine.packing import forward_layout, sample_layout
from serving.engine.placement import placed
from serving.engine.programs import SplitModel
from serving.engine.sizing import Sizes
from serving.engine.state import DeviceState
from sharding.rules import to_sharding


def config_of(hf: dict[str, Any]) -> ModelConfig:
    """The model's configuration from a Hugging Face one.

    Raises:
        ValueError: the architecture is not supported.
    """
    return registry.find((hf.get("architectures") or ["?"])[0]).config(hf)


def layer_periods(config: ModelConfig) -> tuple[int, int]:
    """(layers of an irregular beginning, layers of the pattern that repeats after it), as few as describe the model."""
    L = config.num_layers
    columns = [value for value in vars(config).values() if isinstance(value, tuple) and len(value) == L]
    if config.moe is not None:
        columns.append(config.moe.layers)
    kinds = [tuple(column[i] for column in columns) for i in range(L)]
    splits = sorted(
        ((start, period) for start in range(L) for period in range(1, L - start + 1)), key=lambda s: s[0] + 2 * s[1]
    )
    return next(
        (start, period)
        for start, period in splits
        if all(kinds[i] == kinds[start + (i - start) % period] for i in range(start, L))
    )


def with_layers(config: ModelConfig, num_layers: int) -> ModelConfig:
    """The same model with its first `num_layers` layers only."""
    changes: dict[str, Any] = {
        field.name: getattr(config, field.name)[:num_layers]
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), tuple)
        and field.name != "extra"
        and len(getattr(config, field.name)) == config.num_layers
    }
    if config.moe is not None:
        changes["moe"] = dataclasses.replace(config.moe, layers=config.moe.layers[:num_layers])
    return dataclasses.replace(config, num_layers=num_layers, **changes)


def abstract_model(config: ModelConfig, mesh: Mesh, dtype: Any, quantization: str | None, max_model_len: int) -> Any:
    """The module with a placed ShapeDtypeStruct for every parameter."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    build = Build(
        dtype=jnp.dtype(dtype),
        compute_dtype=jnp.dtype(jnp.float32) if on_cpu else jnp.dtype(dtype),
        mesh=mesh,
        max_model_len=max_model_len,
    )
    model = registry.find(config.architecture).build(config, build)
    quantized = set(quantizable(model)) if quantization else set()
    for path, parameter in parameters_of(model):
        value = parameter.get_value()
        axes = parameter.get_metadata()["logical_axes"]
        if path in quantized:
            value = jax.eval_shape(lambda w: quantize(w, quantization), value)
        parameter.set_value(jax.tree.map(lambda leaf, axes=axes: _place(leaf, axes, mesh, build), value))
    return model


def _place(leaf: Any, axes: Sequence[str | None], mesh: Mesh, build: Build) -> jax.ShapeDtypeStruct:
    """A weight, or a part of a quantized one: scales have the weight's first axes."""
    axes = tuple(axes[: len(leaf.shape)])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to_sharding(mesh, axes, build.rules))


def weight_leaves(model: Any) -> list[tuple[str, tuple[str | None, ...], jax.ShapeDtypeStruct]]:
    """(path, logical axes, array) of every array that holds weights."""
    return [
        (path, parameter.get_metadata()["logical_axes"], leaf)
        for path, parameter in parameters_of(model)
        for leaf in jax.tree.leaves(parameter.get_value())
    ]


def bytes_on_device(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of one device's piece of a placed array."""
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    size = jnp.dtype(leaf.dtype).itemsize
    for extent in shape:
        size *= extent
    return size


def abstract_kv(model: Any, num_pages: int, page_size: int, dtype: str, mesh: Mesh) -> tuple[Any, ...]:
    """One `KVPages` a layer."""
    made: dict[Any, Any] = {}
    for spec in model.kv_specs():
        if spec not in made:
            kv = jax.eval_shape(
                lambda spec=spec: paged_attention.allocate(spec, num_pages, page_size, jnp.dtype(dtype), mesh)
            )
            heads = PartitionSpec(None, "model") if kv.sharded else PartitionSpec()
            made[spec] = jax.tree.map(
                lambda leaf, heads=heads: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, heads)
                ),
                kv,
            )
    return tuple(made[spec] for spec in model.kv_specs())


class AbstractExecutor(Executor):
    """An `Executor` that can name its programs and run none: nothing is allocated."""

    def __init__(self, model: Any, sizes: Sizes, mesh: Mesh) -> None:
        self.sizes = sizes
        self.vocab_size = model.vocab_size
        self.pages_per_slot = -(-sizes.max_model_len // sizes.page_size)
        self.buckets = BucketTable.make(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        self.model = model
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._mesh, self._backend, self.store = mesh, None, None
        self._split, self._leaves = SplitModel.split(model)
        self._kv = abstract_kv(model, sizes.num_pages, sizes.page_size, sizes.kv_dtype, mesh)
        self._state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
            jax.eval_shape(lambda: DeviceState.zeros(sizes.max_num_seqs, self.vocab_size)),
        )
        self.mask_width = -(-self.vocab_size // 32)
        self.forward_layouts = {b: forward_layout(b, self.pages_per_slot) for b in self.buckets.buckets}
        self.sample_layouts = {s: sample_layout(s) for s in self.buckets.sample_sizes}
        self._head, self.max_steps = [], 1

    def programs(self) -> dict[str, Program]:
        """Every program of the server by name, its arguments placed on the mesh."""
        return {program.name: placed(self._mesh, program) for program in self._all_programs()}

    @property
    def kv_bytes_a_page(self) -> int:
        """Bytes of one page of every layer on one device."""
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self._kv)) // self.sizes.num_pages

    @property
    def weight_bytes_on_device(self) -> int:
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self._leaves))

    @property
    def state_bytes(self) -> int:
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self._state))
