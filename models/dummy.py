"""Models with random weights: for tests and for timing shapes without a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from models import registry
from models.config import ModelConfig
from models.layers import Build
from models.parameters import parameters_of
from sharding.rules import to_sharding


def random_model(config: ModelConfig, build: Build | None = None, seed: int = 0) -> Any:
    """A model of `config.architecture` whose matrices are normal with variance 1 / fan-in, norm scales 1, biases 0, and whose
    states decay at rates of 0.05 to 1 a step.

    Raises:
        ValueError: the registry does not know the architecture.
    """
    build = build or Build(max_model_len=config.max_positions)
    model = registry.find(config.architecture).build(config, build)
    parameters = dict(parameters_of(model))
    for path, value in random_values(model, build, seed):
        parameters[path].set_value(value)
    return model


def random_values(model: Any, build: Build, seed: int = 0) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of every parameter of a model, as `random_model` has them."""
    for index, (path, parameter) in enumerate(parameters_of(model)):
        target = parameter.get_value()
        if path.endswith("scale"):
            value = jnp.ones(target.shape, target.dtype)
        elif path.endswith("bias"):
            value = jnp.zeros(target.shape, target.dtype)
        elif path.endswith("rate"):
            value = -jnp.geomspace(0.05, 1.0, target.shape[0], dtype=target.dtype)
        else:
            key = jax.random.fold_in(jax.random.key(seed), index)
            inputs = target.shape[0 if path.endswith("kernel") else -1]  # of a convolution, its taps
            value = (jax.random.normal(key, target.shape) * inputs**-0.5).astype(target.dtype)
        if build.mesh is not None:
            value = jax.device_put(
                value, to_sharding(build.mesh, parameter.get_metadata()["logical_axes"], build.rules)
            )
        yield path, value
