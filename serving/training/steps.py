"""The programs of a run: gradients of a batch, the step that they make, and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from serving.training.network import Frozen, Network, Trained
from serving.training.settings import Optimizer

Objective = Callable[[Any, tuple[jax.Array, ...]], tuple[jax.Array, jax.Array]]
"""(model, batch) -> (the loss summed, how much was right), as in losses.py."""


def learning_rate(settings: Optimizer, steps: int) -> optax.Schedule:
    """By the number of steps that were made: rises linearly from 0, then falls to 0 at `steps`."""
    warmup = int(settings.warmup if settings.warmup >= 1 else np.ceil(settings.warmup * steps))
    peak, rest = settings.learning_rate, max(1, steps - warmup)
    falls = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), falls], [warmup]) if warmup else falls


def optimizer(settings: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW. Norms and biases do not decay."""
    clip = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    adamw = optax.adamw(
        learning_rate(settings, steps),
        *settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        mask=lambda trained: jax.tree.map(lambda x: x.ndim > 1, trained),
    )
    return optax.chain(*clip, adamw)


class Programs:
    """Compiled once each, at the first call.

    Args:
        objective: what is learned.
        transform: from gradients to what is added.
        mesh: rows of a batch are split over its `data` axis.
        accumulates: a step is several calls.
    """

    def __init__(
        self,
        network: Network,
        objective: Objective,
        transform: optax.GradientTransformation,
        mesh: Mesh | None,
        accumulates: bool,
    ):
        self._mesh, self._accumulates = mesh, accumulates
        drops = network.lora is not None and network.lora.dropout > 0

        def gradients(
            trained: Trained, total: Any, frozen: Frozen, batch: Any, share: jax.Array, key: jax.Array
        ) -> tuple[Trained, jax.Array]:
            def loss(trained: Trained) -> tuple[jax.Array, jax.Array]:
                model = network.assembled(frozen, trained, key if drops else None)
                summed, _ = objective(model, batch)
                return summed * share, summed

            found, summed = jax.grad(loss, has_aux=True)(trained)
            return (found if total is None else jax.tree.map(jnp.add, total, found)), summed

        def update(trained: Trained, state: Any, found: Trained) -> tuple[Trained, Any, jax.Array]:
            norm = optax.tree.norm(found)
            moves, state = transform.update(found, state, trained)
            return jax.tree.map(jnp.add, trained, moves), state, norm

        def evaluate(trained: Trained, frozen: Frozen, batch: Any) -> tuple[jax.Array, jax.Array]:
            return objective(network.assembled(frozen, trained, None), batch)

        self._gradients = jax.jit(gradients, donate_argnums=1)
        self._update = jax.jit(update, donate_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)
        self.start = jax.jit(transform.init)

    def gradients(
        self, trained: Trained, frozen: Frozen, batches: Iterable[Any], targets: int, key: jax.Array
    ) -> tuple[Trained, jax.Array]:
        """Gradients of the mean loss over all targets of the batches, and the loss summed."""
        total = jax.tree.map(jnp.zeros_like, trained) if self._accumulates else None
        sums = []
        for index, batch in enumerate(batches):
            share = np.float32(1.0 / max(1, targets))
            total, summed = self._gradients(
                trained, total, frozen, self._placed(batch), share, jax.random.fold_in(key, index)
            )
            sums.append(summed)
        assert total is not None
        return total, sum(sums[1:], sums[0])

    def update(self, trained: Trained, state: Any, found: Trained) -> tuple[Trained, Any, jax.Array]:
        """What is trained and the optimizer's state behind a step, and the gradients' norm before the clip. All but the last are
        the arguments' own memory."""
        return self._update(trained, state, found)

    def evaluate(self, trained: Trained, frozen: Frozen, batches: Iterable[Any]) -> tuple[float, float]:
        """(loss, right), both summed over the batches."""
        results = [self._evaluate(trained, frozen, self._placed(batch)) for batch in batches]
        return sum(float(loss) for loss, _ in results), sum(float(right) for _, right in results)

    def _placed(self, batch: tuple[np.ndarray, ...]) -> Any:
        if self._mesh is None:
            return batch
        return jax.device_put(batch, NamedSharding(self._mesh, PartitionSpec("data")))
