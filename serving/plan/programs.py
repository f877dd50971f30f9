"""The server's own programs over arrays that have shapes and places but no content."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from models import registry
from models.config import ModelConfig
from models.layers import Build
from models.parameters import experts, finer, may_be_in_blocks, parameters_of, rounded_by
from ops import native, paged_attention
from ops.linear import quantize
from ops.linear.weights import grouped
from ops.linear.weights.block_round import four_bits_like
from ops.linear.weights.group_pack import ROUNDED, Packing, place
from ops.linear.weights.int8 import pack_int8
from ops.linear.weights.rotation import BLOCK
from ops.paged_attention import KVGroups, pages
from ops.recurrent import States
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.placement import BY_REPLICA, EVERYWHERE, num_replicas, of_one, placed
from serving.engine.device.programs.program_list import StepShapes, list_programs
from serving.engine.device.programs.state import DeviceState
from serving.engine.device.programs.steps import SplitModel
from serving.engine.device.stores.state_store import abstract_states
from serving.engine.requests.cache_specs import recurrent_of
from serving.engine.requests.sizes import Sizes
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
    # A family's own facts (`extra`) are by layer, too.
    said = [vars(config).items(), *(vars(own).items() for own in (config.moe,) if own is not None)]
    said += [vars(own).items() if hasattr(own, "__dict__") else [("", own)] for _, own in config.extra]
    columns = [
        value for own in said for name, value in own if name != "extra" and isinstance(value, tuple) and len(value) == L
    ]
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


def abstract_model(
    config: ModelConfig, mesh: Mesh, dtype: Any, quantization: str | Packing | None, max_model_len: int
) -> Any:
    """The module with a placed ShapeDtypeStruct for every parameter.

    Args:
        quantization: a scheme that the server rounds by, or how the checkpoint is packed, which GPUs and TPUs keep.
    """
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    build = Build(
        dtype=jnp.dtype(dtype),
        compute_dtype=jnp.dtype(jnp.float32) if on_cpu else jnp.dtype(dtype),
        mesh=mesh,
        max_model_len=max_model_len,
    )
    return _without_values(registry.find(config.architecture).build(config, build), build, quantization)


def abstract_tower(hf: dict[str, Any], mesh: Mesh, dtype: Any, quantization: str | None) -> Any:
    """What reads images or sound beside a model, the same way; None for models that have no such thing."""
    tower = registry.find((hf.get("architectures") or ["?"])[0]).tower
    if tower is None or (tower.reads == "image" and not hf.get("vision_config")):
        return None
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    compute = jnp.dtype(jnp.float32) if on_cpu else jnp.dtype(dtype)
    build = Build(dtype=jnp.dtype(dtype), compute_dtype=compute, mesh=mesh)
    return _without_values(tower.build(tower.config(hf), build), build, quantization)


def _in_groups(model: Any, build: Build, quantization: str | Packing) -> Any:
    """`_without_values` where weights are kept or rounded in groups; see `models.loading.load.fill`."""
    mesh = build.mesh
    assert mesh is not None
    platform = mesh.devices.flat[0].platform
    six = finer(model) if isinstance(quantization, str) else {}
    quantized = rounded_by(model, "int4")
    if isinstance(quantization, Packing):  # those who pack a checkpoint leave its head and its table, as a rule
        own = {f"{path}.{part}" for path in experts(model) for part in ("gate_up", "down")}
        quantized = own if quantization.experts else quantized - {"head.weight", "embed.weight"}
    for path, parameter in parameters_of(model):
        value, axes = parameter.get_value(), parameter.get_metadata()["logical_axes"]
        sharding = to_sharding(mesh, axes, build.rules)
        how = quantization if isinstance(quantization, Packing) else ROUNDED[8 if path in six else 4]
        cuts = value.shape[-1] // sharding.shard_shape(value.shape)[-1]
        spread = isinstance(how, Packing) and how is quantization and parameter.get_metadata().get("spread") is not None
        weight = how.like(value.shape, platform, cuts) if path in quantized and not spread else None
        parameter.set_value(_place(value, axes, mesh, build) if weight is None else place(weight, sharding))
    return model


def _without_values(model: Any, build: Build, quantization: str | Packing | None) -> Any:
    """The module with what will be its weights' shapes and places."""
    mesh = build.mesh
    assert mesh is not None
    if isinstance(quantization, Packing) or (
        quantization == "int4" and mesh.devices.flat[0].platform in grouped.PLATFORMS
    ):
        return _in_groups(model, build, quantization)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    quantized = rounded_by(model, quantization)
    six = finer(model) if quantization == "int4" else {}
    packs = on_cpu and mesh.size == 1 and native.available()  # as ops.linear.pack decides for arrays
    for path, parameter in parameters_of(model):
        value = parameter.get_value()
        axes = parameter.get_metadata()["logical_axes"]
        if path in quantized and packs and quantization == "int4" and may_be_in_blocks(parameter):
            value = four_bits_like((math.prod(value.shape[:-1]), value.shape[-1]), six.get(path))
        elif path in quantized:
            inputs = to_sharding(mesh, axes, build.rules).shard_shape(value.shape)[-1]
            value = jax.eval_shape(lambda w: quantize(w, quantization), value)
            # Traced, `quantize` does not know how the weight is cut.
            value = dataclasses.replace(value, rotated=inputs % BLOCK == 0)
            if packs and len(value.shape) == 2:
                value = jax.eval_shape(pack_int8, value)
            elif packs and parameter.get_metadata().get("packed"):
                value = jax.eval_shape(lambda w: pack_int8(w.flat()), value)
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


def abstract_kv(groups: KVGroups, num_pages: int, page_size: int, dtype: str, mesh: Mesh) -> tuple[Any, ...]:
    """Every `KVPages`, as the server would allocate them; it uses no mesh on a single device."""
    platform = pages.platform_of(mesh)
    server_mesh = mesh if mesh.size > 1 else None
    made: dict[Any, Any] = {}
    for spec in groups.arrays:
        if spec in made:
            continue
        layout = paged_attention.best_layout(spec, page_size, dtype, platform)
        make = functools.partial(pages.allocate, spec, num_pages, page_size, dtype, server_mesh, layout)
        kv = jax.eval_shape(make)
        kv = dataclasses.replace(kv, platform=platform)
        place: Any = NamedSharding(mesh, kv.placement)
        if server_mesh is None:
            place = SingleDeviceSharding(mesh.devices.flat[0])
        made[spec] = jax.tree.map(
            lambda leaf, place=place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), kv
        )
    return tuple(made[spec] for spec in groups.arrays)


class AbstractEngine:
    """What an `Executor` would own, as shapes and places: it names the executor's programs and runs none.

    Attributes:
        model: from `abstract_model`.
        shapes: of the steps.
        leaves, kv, recurrent, state: ShapeDtypeStructs of weights, pages, recurrent layers' states and device state.
        mesh: where they are.
    """

    def __init__(self, model: Any, sizes: Sizes, mesh: Mesh) -> None:
        self.model = model
        self.sizes = sizes
        self.shapes = StepShapes.of(sizes, model)
        self.mesh = mesh
        self._server_mesh = mesh if mesh.size > 1 else None
        self._split, self.leaves = SplitModel.split(model)
        self.kv = abstract_kv(self.shapes.groups, sizes.num_pages, sizes.page_size, sizes.kv_dtype, mesh)
        replicas = num_replicas(mesh)
        self.recurrent = self._abstract_states(replicas)
        place: Any = SingleDeviceSharding(mesh.devices.flat[0])
        if self._server_mesh is not None:
            place = NamedSharding(mesh, BY_REPLICA if replicas > 1 else EVERYWHERE)
        self.state = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            jax.eval_shape(lambda: DeviceState.zeros(replicas * (sizes.max_num_seqs + 1) - 1, model.vocab_size)),
        )

    def programs(self) -> dict[ProgramKey, Program]:
        """Every program of the server, its arguments placed on the mesh."""
        cache, state = jax.tree.map(
            lambda array: of_one(self._server_mesh, array), ((*self.kv, *self.recurrent), self.state)
        )
        listed = list_programs(self._split, self.leaves, cache, state, self.shapes)
        return {program.key: placed(self._server_mesh, program) for program in listed.programs}

    def _abstract_states(self, replicas: int) -> tuple[States, ...]:
        """What recurrent layers keep of running requests; () where there are none."""
        spec = recurrent_of(self.model)
        if spec is None:
            return ()
        states = abstract_states(spec, self.sizes.max_num_seqs + 1, self._server_mesh, replicas)
        here, places = SingleDeviceSharding(self.mesh.devices.flat[0]), dict(states.placements)
        arrays = {
            name: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=NamedSharding(self.mesh, places[name]) if name in places else here
            )
            for name, a in states.arrays.items()
        }
        return (States(arrays, states.placements),)

    @property
    def kv_bytes_a_page(self) -> int:
        """Bytes of one page, in every array, on one device of its replica."""
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self.kv)) // self.sizes.num_pages

    @property
    def kv_of_layers(self) -> tuple[Any, ...]:
        """The `KVPages` of each layer, shared with others or not."""
        places = self.shapes.groups.places
        return self.kv if places is None else tuple(self.kv[array] for _, array, _ in places)

    @property
    def read_by_layers(self) -> tuple[int, ...]:
        """Of each layer that attends, whose pages it reads, by their place in `kv_specs`: its own, or an earlier one's."""
        kept = getattr(self.model, "kept", None)
        if kept is None:  # traced models (models/bridge)
            return tuple(range(len(self.model.kv_specs())))
        return tuple(place for place in kept.pages if place is not None)

    @property
    def kv_bytes_a_token(self) -> tuple[float, ...]:
        """Of each layer, bytes of one position on one device of its replica."""
        tokens = self.sizes.num_pages * self.sizes.page_size
        return tuple(
            sum(map(bytes_on_device, jax.tree.leaves(kv))) / kv.spec.parts_of(spec) / tokens
            for spec, kv in zip(self.model.kv_specs(), self.kv_of_layers, strict=True)
        )

    @property
    def bytes_a_state(self) -> int:
        """Of one recurrent state on one device of its replica; 0 where no layer keeps one."""
        return sum(map(bytes_on_device, jax.tree.leaves(self.recurrent))) // (self.sizes.max_num_seqs + 1)

    @property
    def weight_bytes_on_device(self) -> int:
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves(self.leaves))

    @property
    def state_bytes(self) -> int:
        return sum(bytes_on_device(leaf) for leaf in jax.tree.leaves((self.state, self.recurrent)))
