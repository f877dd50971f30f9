"""A loaded model as a function of what is trained: the module stays what families define, its parameters come in anew each step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.layers import Embedding, Linear
from models.layers.moe import Experts
from models.parameters import parameters_of
from models.recipes import Recipe
from ops.linear import StoredWeight
from ops.linear.weights.trained import TrainedWeight
from serving.training.lora import LoraSettings, Site, changes, sites, start

log = logging.getLogger(__name__)

Trained = dict[str, Any]
"""What the optimizer moves, float32: pairs by the names of tensors, or arrays by the paths of parameters."""

Frozen = dict[str, Any]
"""Path of a parameter -> what it is stored as."""


class Recomputed(nnx.Module):
    """A layer of which a backward pass keeps the input alone and computes the rest again (Chen et al. 2016, arXiv:1604.06174)."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, *inputs: Any) -> Any:
        graphdef, state = nnx.split(self.layer)

        def run(state: Any, *inputs: Any) -> Any:
            return nnx.merge(graphdef, state)(*inputs)

        return jax.checkpoint(run)(state, *inputs)


@dataclasses.dataclass(frozen=True)
class Network:
    """What a step assembles its model from.

    Attributes:
        lora: None where all parameters are trained.
        sites: where pairs go.
        products: paths of parameters that are only ever multiplied with or looked up, whatever they are stored as.
        compute_dtype: of activations and pairs.
        product_dtype: what masters are rounded to for products.
        recompute: layers are recomputed in the backward pass.
    """

    graphdef: Any
    template: Any
    lora: LoraSettings | None
    sites: tuple[Site, ...]
    products: frozenset[str]
    compute_dtype: Any
    product_dtype: Any
    recompute: bool

    def assembled(self, frozen: Frozen, trained: Trained, key: jax.Array | None) -> Any:
        """The model with everything in it, inside a program.

        Args:
            key: of dropout; None where nothing is dropped.
        """
        model = nnx.merge(self.graphdef, self.template, copy=True)
        model.compute_dtype = self.compute_dtype
        parameters = dict(parameters_of(model))
        values = dict(frozen)
        if self.lora is None:
            values |= {path: self._cast(path, value) for path, value in trained.items()}
        for path, parameter in parameters.items():
            value = values[path]
            parameter.set_value(TrainedWeight(value) if path in self.products else value)
        if self.lora is not None:
            for site, change in changes(self.sites, trained, self.lora, self.compute_dtype, key):
                base = values[site.path]
                if site.linear:
                    value = TrainedWeight(base, change)
                else:
                    value = (base + (change.b_RO.T @ change.a_RI).reshape(base.shape)).astype(base.dtype)
                parameters[site.path].set_value(value)
        if self.recompute:
            for index, layer in enumerate(model.layers):
                model.layers[index] = Recomputed(layer)
        return model

    def _cast(self, path: str, value: jax.Array) -> jax.Array:
        """Masters as products take them; norms and biases stay float32, as they are served."""
        return value.astype(self.product_dtype) if path in self.products or value.ndim > 1 else value


def take_apart(
    model: Any, lora: LoraSettings | None, compute_dtype: Any, product_dtype: Any, recompute: bool, seed: int
) -> tuple[Network, Frozen, Trained]:
    """A loaded model as (how a step assembles it, what stays as it is, what is trained from here on).

    The model's parameters are empty afterwards: nothing is held twice.

    Raises:
        ValueError: a model that cannot be trained, targets that fit nothing, or all of a quantized or spread model.
    """
    if getattr(model, "state_specs", tuple)():
        raise ValueError(
            "the model has recurrent layers, whose states are not differentiated yet: it cannot be trained."
        )
    parameters = dict(parameters_of(model))
    recipes: dict[str, Recipe] = model.recipes()
    values = {path: parameter.get_value() for path, parameter in parameters.items()}
    products = set()
    for path, module in nnx.iter_modules(model):
        own = {Experts: ("gate_up", "down"), Linear: ("weight",), Embedding: ("weight",)}
        parts = next((parts for kind, parts in own.items() if isinstance(module, kind)), ())
        products |= {".".join(map(str, (*path, part))) for part in parts}
    if lora is None:
        places: tuple[Site, ...] = ()
        trained = {path: values.pop(path) for path in _trainable(parameters, recipes)}
        trained = {path: value.astype(jnp.float32) for path, value in trained.items()}
    else:
        places = sites(model, lora)
        for site in places:
            if not site.linear and isinstance(values[site.path], StoredWeight):
                raise ValueError(f"{site.path} is quantized and cannot be changed before it is used.")
        trained = start(places, lora, seed)
    for parameter in parameters.values():
        parameter.set_value(jax.ShapeDtypeStruct(parameter.shape, jnp.float32))
    graphdef, template = nnx.split(model)
    network = Network(graphdef, template, lora, places, frozenset(products), compute_dtype, product_dtype, recompute)
    return network, values, trained


def _trainable(parameters: Mapping[str, Any], recipes: Mapping[str, Recipe]) -> list[str]:
    """Paths of what full fine-tuning moves: all that can be written back as tensors of a checkpoint."""
    found, left = [], []
    for path, parameter in parameters.items():
        value = parameter.get_value()
        if isinstance(value, StoredWeight):
            raise ValueError(f"{path} is quantized: only LoRA trains beside quantized weights.")
        if parameter.stored_shape != tuple(value.shape):
            raise ValueError(
                "the mesh does not divide the model's key/value heads: train all of it on a model axis that does, or use LoRA."
            )
        (found if recipes[path].invertible else left).append(path)
    if left:
        log.warning(
            "%d parameters are computed from the checkpoint's and stay as they are: %s.", len(left), ", ".join(left[:5])
        )
    return found


def placed_like(trained: Trained, mesh: Mesh | None) -> Trained:
    """Pairs copied to every device of a mesh; arrays of the model lie where they were loaded."""
    if mesh is None:
        return trained
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: x if len(x.devices()) > 1 else jax.device_put(x, whole), trained)
