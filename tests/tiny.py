"""A tiny random Llama and an engine around it: every part is real but the weights, and it compiles in seconds."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Generator, Mapping
from types import SimpleNamespace
from typing import Any

import jax
from flax import nnx

from models.config import ModelConfig, RopeConfig
from models.decoder import Decoder
from models.embedding_head import EmbeddingHead
from models.layers import Build
from serving.engine.api.config import EngineConfig
from serving.engine.api.types import EngineInfo
from serving.engine.device.executor import Executor
from serving.engine.device.programs import compiling
from serving.engine.device.programs.compiling import ProgramCache, starting
from serving.engine.device.runner import StepRunner
from serving.engine.engine import Engine
from serving.engine.requests import buckets
from serving.engine.requests.cache_specs import paged
from serving.engine.requests.sizes import Sizes
from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig
from serving.transfer.config import TransferConfig
from serving.transfer.exchange import exchange_pages

compiling.MOST_AT_ONCE = 1  # the other core has other tests to run. Servers that tests start compile as servers do.

VOCAB = 256
PROGRAMS = "JAXSERVE_TEST_PROGRAMS"


@functools.cache
def tiny_model() -> nnx.Module:
    """3 layers, 4 query and 2 key/value heads of 16, float32."""
    config = ModelConfig(
        "LlamaForCausalLM", VOCAB, 3, 64, 96, 4, 2, 16, 512, 1e-5, tie_embeddings=True, rope=RopeConfig(10000.0, 16)
    )
    graphdef, state = nnx.split(Decoder(config, Build(max_model_len=512)))
    leaves, treedef = jax.tree.flatten(state)
    key = jax.random.key(1)
    filled = [
        jax.random.normal(jax.random.fold_in(key, i), leaf.shape, leaf.dtype) * (0.4 if len(leaf.shape) > 1 else 0.1)
        + (0.0 if len(leaf.shape) > 1 else 1.0)
        for i, leaf in enumerate(leaves)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, filled))


def own_tiny_model(scale: float = 1.0) -> nnx.Module:
    """`tiny_model` with arrays of its own, times `scale`: for whoever deletes, donates or trains them. The cached ones are
    everybody's in this process."""
    graph, state = nnx.split(tiny_model())
    return nnx.merge(graph, jax.tree.map(lambda x: x * scale + 0, state))


def tiny_engine(
    config: EngineConfig | None = None,
    *,
    max_num_seqs: int = 4,
    max_num_batched_tokens: int = 64,
    max_model_len: int = 128,
    num_pages: int = 80,
    page_size: int = 8,
    host_pages: int = 0,
    steps: int | None = 1,
    model: Any = None,
    layers_per_page: int | None = None,
    windows: tuple[int | None, ...] | None = None,
    num_snapshots: int = 0,
    snapshots: Mapping[str, int] | None = None,
    draft: Any = None,
    transfers: TransferConfig | None = None,
    transport: Any = None,
    disk: tuple[pathlib.Path, int] | None = None,
    adapter_slots: int = 0,
) -> Engine:
    """A started engine; shut it down. Programs are cached over the test session.

    Args:
        model: another than `tiny_model`.
        steps: as num_scheduler_steps.
        layers_per_page: as in Sizes.
        windows: as in SchedulerConfig; None for those of the model's groups.
        num_snapshots: of a model whose layers keep states.
        snapshots: where they are taken, as in RecurrentSpec.
        draft: a draft model, with the same vocabulary.
        transfers: with whom it exchanges pages; None: with nobody. All tiny engines have the same weights.
        transport: how pages come to it.
        disk: folder and bytes for pages that leave host memory.
        adapter_slots: room for so many adapters, which changes the model: give one of its own.
    """
    model = model or tiny_model()
    config = config or EngineConfig(page_size=page_size, progress=False)
    sizes = Sizes(
        max_num_seqs, max_num_batched_tokens, max_model_len, num_pages, page_size, 0, "float32", layers_per_page,
        num_snapshots,
    )  # fmt: skip
    how = config.speculative_config
    if how is not None:
        sizes = dataclasses.replace(sizes, draft_tokens=how.draft_tokens, draft_places=max_num_batched_tokens)
    made_for = ("tiny", os.environ.get("XLA_FLAGS"), model.config, sizes, *([] if draft is None else [draft.config]))
    travel = transfers is not None
    cache = ProgramCache(_cache_folder(), repr(made_for))
    with starting():
        executor = Executor(
            model, sizes, cache, host_tier=host_pages > 0, travel=travel, num_scheduler_steps=steps or 1, draft=draft,
            adapter_slots=adapter_slots,
        )  # fmt: skip
        executor.compile()
    runner = StepRunner(executor)
    recurrent = () if executor.recurrent is None else (dataclasses.replace(executor.recurrent, **(snapshots or {})),)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs,
            max_num_batched_tokens,
            runner.buckets.max_chunk,
            runner.buckets.max_rows,
            max_model_len,
            page_size,
            num_pages,
            config.policy,
            config.enable_prefix_caching,
            host_pages=host_pages,
            num_scheduler_steps=steps,
            caches=(*paged(*(executor.groups.windows if windows is None else windows)), *recurrent),
            num_snapshots=num_snapshots,
            speculative_config=how,
            buckets=None if how is None else runner.buckets,
            step_seconds=executor.step_seconds,
            adapter_slots=adapter_slots,
        )
    )
    info = EngineInfo(
        "tiny", "LlamaForCausalLM", model.config.vocab_size, max_model_len, max_num_seqs, max_num_batched_tokens, page_size,
        num_pages, "float32", None, "data=1,model=1", "cpu", "test", role="" if transfers is None else transfers.role,
    )  # fmt: skip
    loaded = SimpleNamespace(source=None, generation_config={}, embedding=EmbeddingHead(("last",)))
    engine = Engine(config, loaded, runner, scheduler, info)
    if transfers is not None or disk is not None:
        exchange_pages(engine, transfers or TransferConfig(), b"tiny", (model.config,), transport, disk)
    engine.loop.start()
    return engine


@contextlib.contextmanager
def one_width() -> Generator[None]:
    """Engines that are started inside have decode steps of one width, the largest: compiling is most of the time of tests that are
    about something else."""
    before = buckets._doubling
    buckets._doubling = lambda low, high: [high]
    try:
        yield
    finally:
        buckets._doubling = before


@functools.cache
def _cache_folder() -> pathlib.Path:
    """Of this run: `tests/conftest.py` names one that all test processes share, and throws it away."""
    named = os.environ.get(PROGRAMS)
    if named is not None:
        return pathlib.Path(named)
    folder = tempfile.mkdtemp(prefix="jaxserve-test-programs-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return pathlib.Path(folder)
