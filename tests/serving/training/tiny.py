"""Tiny random models of transformers, and the parts of a run around them, without a tokenizer."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from models.loading.load import load_model, resolve
from serving.training import losses
from serving.training.examples import Example
from serving.training.lora import LoraSettings
from serving.training.network import placed_like, take_apart
from serving.training.packing import Plan, Rows, pack
from serving.training.settings import Optimizer
from serving.training.steps import Programs, optimizer
from sharding.mesh import make_mesh
from tests.models.tiny import TINY
from tests.models.tiny_base import BASE, VOCAB


def make_model(name: str, directory: Path) -> Any:
    """A model of the table in tests/models/tiny.py, saved to a directory; and itself."""
    import torch
    import transformers

    tiny = TINY[name]
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None or key not in BASE}
    torch.manual_seed(0)
    model = getattr(transformers, tiny.model)(getattr(transformers, tiny.config)(**fields)).float().eval()  # no dropout
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    model.save_pretrained(directory)
    return model


def examples(count: int, longest: int = 40, seed: int = 0, vocab: int = VOCAB) -> list[Example]:
    """Random texts, of each of which the second half is learned."""
    rng = np.random.default_rng(seed)
    found = []
    for line in range(count):
        length = int(rng.integers(longest // 3, longest + 1))
        found.append(Example(rng.integers(3, vocab, length).astype(np.int32), np.arange(length) >= length // 2, line))
    return found


class Bench:
    """A model taken apart, and its programs.

    Args:
        rows: what is trained on; None for none.
    """

    def __init__(
        self,
        directory: Path,
        rows: Rows,
        lora: LoraSettings | None,
        settings: Optimizer | None = None,
        *,
        steps: int = 5,
        mesh: str | None = None,
        recompute: bool = False,
        quantization: str | None = None,
        product_dtype: str = "float32",
        accumulates: bool = False,
    ):
        devices = None if mesh is None else make_mesh(mesh)
        loaded = load_model(
            resolve(str(directory)),
            dtype="float32" if lora is None else product_dtype,
            mesh=devices,
            max_model_len=128,
            progress=False,
            quantization=quantization,
        )
        self.recipes = loaded.model.recipes()
        self.network, self.frozen, trained = take_apart(
            loaded.model, lora, jnp.dtype("float32"), jnp.dtype(product_dtype), recompute, 0
        )
        self.trained = placed_like(trained, devices)
        objective = functools.partial(losses.next_tokens, single=not rows.packed)
        self.programs = Programs(
            self.network, objective, optimizer(settings or Optimizer(), steps), devices, accumulates
        )
        self.rows, self.state = rows, None

    def gradients(self, *calls: np.ndarray) -> tuple[dict[str, Any], float]:
        """(gradients of the mean loss over those rows, the mean loss)."""
        import jax

        batches = [self.rows.take(np.asarray(call)) for call in calls]
        targets = sum(int(batch[5].sum()) for batch in batches)
        found, summed = self.programs.gradients(self.trained, self.frozen, batches, targets, jax.random.key(0))
        return found, float(summed) / targets

    def step(self, *calls: np.ndarray) -> float:
        """One optimizer step; the loss before it."""
        found, loss = self.gradients(*calls)
        state = self.programs.start(self.trained) if self.state is None else self.state
        self.trained, self.state, _ = self.programs.update(self.trained, state, found)
        return loss


__all__ = ["VOCAB", "Bench", "LoraSettings", "Optimizer", "Plan", "examples", "make_model", "pack"]
