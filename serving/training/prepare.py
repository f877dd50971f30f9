"""From settings to everything that a run's steps need: the data in rows, the model taken apart, the programs."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models.loading.load import load_model
from models.loading.opening import Opened, open_checkpoint
from models.loading.source import resolve
from serving.boot.text_side import load_text_side, read_template
from serving.text.tokenizer import Tokenizer
from serving.training import losses
from serving.training.examples import Reader
from serving.training.network import Frozen, Network, Trained, placed_like, take_apart
from serving.training.packing import Batch, PairRows, Plan, Rows, pack, pair_rows
from serving.training.settings import Settings
from serving.training.steps import Objective, Programs, optimizer
from sharding.mesh import make_mesh

log = logging.getLogger(__name__)

KEPT_BYTES = 4 << 30
"""Activations of a batch that are kept for its backward pass; above, layers are recomputed."""


@dataclasses.dataclass(frozen=True)
class Data:
    """What is learned from and evaluated on.

    Attributes:
        training, evaluation: rows; None where there is no evaluation.
        plan: which rows each step takes.
        steps: of the whole run.
    """

    training: Rows | PairRows
    evaluation: Rows | PairRows | None
    plan: Plan
    steps: int

    def batches(self, step: int) -> tuple[list[Batch], int, int]:
        """A step's batches, how many targets the loss is on, and how many tokens they have."""
        calls = list(self.plan.calls(step))
        batches = [self.training.take(call) for call in calls]
        if isinstance(self.training, PairRows):
            return batches, sum(int((call >= 0).sum()) for call in calls), sum(int(b[1].sum()) for b in batches)
        return batches, sum(int(b[5].sum()) for b in batches), sum(int((b[1] > 0).sum()) for b in batches)

    def evaluation_batches(self) -> Iterator[Batch]:
        """All of the evaluation data, in batches of the training's size."""
        assert self.evaluation is not None
        for begin in range(0, len(self.evaluation), self.plan.batch):
            index = np.full(self.plan.batch, -1, np.int64)
            mine = np.arange(begin, min(begin + self.plan.batch, len(self.evaluation)))
            index[: len(mine)] = mine
            yield self.evaluation.take(index)


@dataclasses.dataclass
class Run:
    """A run that is ready for its first step.

    Attributes:
        opened, tokenizer, recipes: of the base, for what is written in the end.
        template: the chat template's source, where the operator gave one.
        trained, frozen: see network.py.
        turned: the base keeps its matrices [in, out].
    """

    opened: Opened
    tokenizer: Tokenizer
    template: str | None
    task: str
    data: Data
    network: Network
    programs: Programs
    recipes: dict[str, Any]
    frozen: Frozen
    trained: Trained


def prepare(settings: Settings) -> Run:
    """Reads the data first, then the weights: what is wrong with a line is said before anything is loaded.

    Raises:
        ValueError: in a sentence: a model, a file, a line or a setting that cannot be used.
    """
    source = resolve(settings.model)
    opened = open_checkpoint(source)
    task = settings.task or ("generate" if "generate" in opened.family.tasks else "embed")
    if task not in opened.family.tasks:
        raise ValueError(f"--task {task}: {opened.family.name} is for {', '.join(opened.family.tasks)}.")
    if opened.family.traced:
        raise ValueError(
            f"{opened.model_id} runs transformers' own code, recorded for serving: it has no backward pass here. Train it with "
            "transformers and peft; adapters made there are served."
        )
    template = read_template(settings.chat_template) if settings.chat_template is not None else None
    text = load_text_side(source, template)
    if not text.tokenizer.reads_text:
        raise ValueError("the model has no tokenizer: there is nothing to read the training data with.")
    mesh = make_mesh(settings.mesh) if settings.mesh else None
    reader = Reader(text.tokenizer, text.chat_template, settings.template_arguments)
    data = _data(settings, reader, task, mesh)
    on_cpu = (jax.devices() if mesh is None else mesh.devices.flat)[0].platform == "cpu"
    products = ("float32" if on_cpu else "bfloat16") if settings.dtype == "auto" else settings.dtype
    compute = "float32" if on_cpu else products  # on CPUs only products are faster in half precision
    loaded = load_model(
        source,
        dtype="float32" if settings.lora is None else products,
        mesh=mesh,
        quantization=settings.quantization,
        max_model_len=_row_length(data.training),
        progress=sys.stderr.isatty(),
        opened=opened,
    )
    recipes = loaded.model.recipes()
    recompute = settings.recompute
    if recompute is None:
        recompute = _kept_bytes(loaded.config, data.training, settings.batch, compute) > KEPT_BYTES
    network, frozen, trained = take_apart(
        loaded.model, settings.lora, jnp.dtype(compute), jnp.dtype(products), recompute, settings.seed
    )
    trained = placed_like(trained, mesh)
    objective = _objective(settings, task, data.training, opened)
    transform = optimizer(settings.optimizer, data.steps)
    programs = Programs(network, objective, transform, mesh, settings.accumulate > 1)
    return Run(opened, text.tokenizer, template, task, data, network, programs, recipes, frozen, trained)


def _data(settings: Settings, reader: Reader, task: str, mesh: Mesh | None) -> Data:
    read = reader.pairs if task == "embed" else reader.examples
    items: list[Any] = [item for path in settings.data for item in read(path)]
    held: list[Any] = [] if settings.eval_data is None else list(read(settings.eval_data))
    if settings.eval_share and settings.eval_data is None:
        order = np.random.default_rng((settings.seed, 1)).permutation(len(items))
        count = min(len(items) - 1, math.ceil(settings.eval_share * len(items)))
        held = [items[index] for index in sorted(order[:count])]
        items = [items[index] for index in sorted(order[count:])]

    def rows(items: list[Any]) -> Rows | PairRows:
        if task == "embed":
            return pair_rows(items, settings.max_length)
        return pack(items, settings.max_length, packing=settings.packing, seed=settings.seed)

    training = rows(items)
    shards = 1 if mesh is None else mesh.shape["data"]
    if settings.batch % shards:
        raise ValueError(f"--batch is {settings.batch}, which the mesh's data axis of {shards} does not divide.")
    plan = Plan(len(training), settings.batch, settings.accumulate, settings.seed)
    steps = settings.max_steps or max(1, math.ceil(settings.epochs * plan.steps_an_epoch))
    return Data(training, rows(held) if held else None, plan, steps)


def _row_length(rows: Rows | PairRows) -> int:
    return (rows.tokens_NkS if isinstance(rows, PairRows) else rows.tokens_NS).shape[-1]


def _kept_bytes(config: Any, rows: Rows | PairRows, batch: int, dtype: str) -> int:
    """About what a backward pass needs of the forward one."""
    texts = rows.tokens_NkS.shape[1] if isinstance(rows, PairRows) else 1
    tokens = batch * texts * _row_length(rows)
    return tokens * config.num_layers * (14 * config.embed_dim + 4 * config.ffw_dim) * jnp.dtype(dtype).itemsize


def _objective(settings: Settings, task: str, rows: Rows | PairRows, opened: Opened) -> Objective:
    if isinstance(rows, Rows):
        return functools.partial(losses.next_tokens, single=not rows.packed)
    if opened.embedding.steps:
        log.warning("the steps behind pooling (%d) are not trained and not applied.", len(opened.embedding.steps))
    return functools.partial(losses.pairs, modes=opened.embedding.modes, temperature=settings.temperature)
