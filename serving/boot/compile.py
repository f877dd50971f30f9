"""The third step of the start: sizes, pages, and every program compiled or found compiled."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from models.adapters.attach import bytes_of_stacks
from models.label_head import LabelHead
from models.loading.load import LoadedModel
from models.parameters import forms_of, parameters_of
from ops.paged_attention import KVGroups
from serving.boot.check import Checked, facts_of
from serving.boot.senses.tower import CheckedTower
from serving.engine.api import phases
from serving.engine.api.types import EngineInfo
from serving.engine.device.executor import Executor
from serving.engine.device.followers import Meet
from serving.engine.device.media import VisionTower
from serving.engine.device.programs.compiling import ProgramCache
from serving.engine.device.programs.fingerprint import fingerprint
from serving.engine.device.programs.placement import num_replicas
from serving.engine.device.runner import StepRunner
from serving.engine.device.sizing import GIB, Bounds, default_kv_memory, in_words
from serving.engine.encoder.runner import EncoderBuckets, EncoderRunner
from serving.engine.requests.buckets import ACCELERATOR_RIDGE, CPU_RIDGE
from serving.engine.requests.cache_specs import paged, recurrent_of
from serving.engine.requests.scheduler_config import SchedulerConfig
from serving.engine.requests.sizes import Sizes
from serving.transfer.config import TransferConfig

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class CompiledDecoder:
    """A model that generates, ready to run steps.

    Attributes:
        runner: owns weights, pages and programs.
        scheduler: what its scheduler is to be started with.
        info: what clients are told.
    """

    runner: StepRunner
    scheduler: SchedulerConfig
    info: EngineInfo


@dataclasses.dataclass(frozen=True)
class CompiledEncoder:
    """A model that reads, ready to run batches."""

    runner: EncoderRunner
    info: EngineInfo
    labels: LabelHead | None = None


def compile_decoder(
    checked: Checked,
    loaded: LoadedModel,
    say: Progress,
    meet: Meet | None = None,
    draft: Any = None,
    tower: VisionTower | None = None,
) -> CompiledDecoder:
    """Makes pages and programs; says what they are.

    Args:
        draft, tower: the draft model, and what reads images, loaded; None for none.
        meet: with several processes, `Followers.least`. All compile the same; a follower has no use for the scheduler.
    Raises:
        ValueError: the pages do not fit, or a bundle's programs are another's.
    """
    config, replicas = checked.config, num_replicas(checked.mesh)
    assert checked.bounds is not None
    stacks = _bytes_of_adapters(checked, loaded)
    less = stacks + (0 if checked.tower is None else checked.tower.store_bytes)
    memory = config.kv_cache_memory or default_kv_memory(checked.mesh.size, config.gpu_memory_utilization, less=less)
    sizes = checked.bounds.within(memory if meet is None else meet("KV cache memory", memory))
    say(_pages_in_words(checked, loaded, sizes, replicas))
    role = TransferConfig.of(config.role, config.kv_transfer_config).role
    began = time.monotonic()
    executor = Executor(
        loaded.model,
        sizes,
        _cache(checked, loaded, sizes, draft),
        mesh=checked.server_mesh,
        attention_backend=config.attention_backend,
        host_tier=config.kv_offload_gb > 0,
        travel=bool(role),
        num_scheduler_steps=config.num_scheduler_steps or 1,
        adapter_slots=config.adapter_slots,
        max_lora_rank=config.max_lora_rank,
        lora_dtype=config.lora_dtype,
        draft=draft,
        tower=tower,
    )
    with progress_bar(config.progress) as on_done:
        executor.compile(on_done, meet)
    runner = StepRunner(executor, config.max_cpu_loras or 4 * config.max_loras)
    if executor.adapters is not None:
        if checked.opened.checkpoint is not None:
            runner.adapters.read_base = checked.opened.checkpoint.read
        weights = len(executor.adapters.room.sites)
        say(
            f"adapters: {config.max_loras} at once, of rank {config.max_lora_rank} at most, for {weights} weights; "
            f"{in_words(stacks)} on each device"
        )
    if sizes.draft_tokens and config.speculative_config is not None:
        say(f"drafts: {config.speculative_config.method}, up to {sizes.draft_tokens} of a request in a step")
    say(f"compiled {len(runner.buckets.buckets)} step shapes in {time.monotonic() - began:.1f} s")
    phases.record("compile", time.monotonic() - began)
    scheduler = _scheduler_config(checked, sizes, executor, runner, replicas)
    return CompiledDecoder(runner, scheduler, _decoder_info(checked, sizes, executor.num_parameters))


def _decoder_info(checked: Checked, sizes: Sizes, num_parameters: int) -> EngineInfo:
    replicas = num_replicas(checked.mesh)
    return EngineInfo(
        **facts_of(checked),
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs * replicas,
        max_num_batched_tokens=sizes.max_num_batched_tokens * replicas,
        page_size=sizes.page_size,
        num_pages=sizes.num_pages * replicas,
        kv_cache_dtype=sizes.kv_dtype,
        num_parameters=num_parameters,
        role=TransferConfig.of(checked.config.role, checked.config.kv_transfer_config).role,
        **_senses(checked.tower),
        **checked.opened.embedding.facts(),
    )


def info_before(checked: Checked) -> EngineInfo:
    """What clients are told of a model whose weights are not loaded: the same as afterwards, where its `kv_cache_memory` is given.

    Raises:
        ValueError: the pages do not fit into that.
    """
    num_parameters = sum(weight.get_value().size for _, weight in parameters_of(checked.built.model))
    if checked.bounds is None:
        labels = LabelHead.of(checked.built.config) if "classify" in checked.opened.family.tasks else None
        return _encoder_info(checked, labels, num_parameters)
    return _decoder_info(checked, _sizes_before(checked, checked.bounds), num_parameters)


def cache_bytes_before(checked: Checked) -> int:
    """What pages, states, snapshots and embeddings of a model will take of the devices, whose weights are not loaded; 0 for an
    encoder.

    Raises:
        ValueError: as `info_before`.
    """
    if checked.bounds is None:
        return 0
    sizes, spec = _sizes_before(checked, checked.bounds), checked.bounds.recurrent
    states = 0 if spec is None else (sizes.max_num_seqs + 1 + sizes.num_snapshots) * spec.state_bytes
    embeddings = 0 if checked.tower is None else checked.tower.store_bytes
    return (sizes.num_pages * sizes.page_bytes + states + embeddings) * checked.bounds.replicas


def _sizes_before(checked: Checked, bounds: Bounds) -> Sizes:
    config = checked.config
    return bounds.within(config.kv_cache_memory or default_kv_memory(checked.mesh.size, config.gpu_memory_utilization))


def _bytes_of_adapters(checked: Checked, loaded: LoadedModel) -> int:
    """What room for adapters takes of each device: memory that pages cannot have."""
    config = checked.config
    if not config.adapter_slots:
        return 0
    return bytes_of_stacks(
        loaded.model, config.adapter_slots, config.max_lora_rank, checked.server_mesh, dtype=config.lora_dtype
    )


def _cache(checked: Checked, loaded: LoadedModel, sizes: Sizes, draft: Any) -> ProgramCache:
    """Where the programs are looked for."""
    if checked.bundle is not None:
        checked.bundle.check(loaded.config, sizes)
        return checked.bundle.sealed()
    resolved = {
        **dict.fromkeys(("max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size")),  # in sizes
        "speculative_config": None,
        "num_scheduler_steps": checked.config.num_scheduler_steps or 1,
        "role": bool(TransferConfig.of(checked.config.role, checked.config.kv_transfer_config).role),
        **dict.fromkeys(("kv_cache_dtype", "kv_cache_memory", "gpu_memory_utilization")),
        **_resolved(checked),
    }
    models = loaded.config if checked.draft is None else (loaded.config, checked.draft.facts)
    if checked.tower is not None:
        models = (models, checked.tower.built.config, checked.tower.shape)
    modules = [loaded.model, draft, None if checked.tower is None else checked.tower.built.model]
    weights = [forms_of(module) for module in modules if module is not None]
    return ProgramCache(checked.programs, fingerprint(checked.config, (models, weights), sizes, resolved))


def _resolved(checked: Checked) -> dict[str, Any]:
    return {"dtype": checked.dtype, "quantization": checked.quantization, "mesh": str(checked.mesh)}


def _scheduler_config(
    checked: Checked, sizes: Sizes, executor: Executor, runner: StepRunner, replicas: int
) -> SchedulerConfig:
    config, ridge = checked.config, CPU_RIDGE if checked.platform == "cpu" else ACCELERATOR_RIDGE
    return SchedulerConfig.of(
        config,
        sizes,
        max_chunk_tokens=runner.buckets.max_chunk,
        max_chunk_rows=runner.buckets.max_rows,
        host_pages=int(config.kv_offload_gb * GIB // max(sizes.page_bytes, 1)) // replicas,
        restore_page_s=executor.store.restore_page_s if executor.store is not None else 0.0,
        caches=(*paged(*executor.groups.windows), *(() if executor.recurrent is None else (executor.recurrent,))),
        replicas=replicas,
        buckets=dataclasses.replace(runner.buckets, ridge=ridge),
        step_seconds=executor.step_seconds,
        has_head=executor.draft is not None and executor.draft.hears,
        adapter_slots=config.adapter_slots,
        media_rows=0 if checked.tower is None else checked.tower.shape.rows,
    )


def compile_encoder(checked: Checked, loaded: LoadedModel, say: Progress) -> CompiledEncoder:
    """Makes an encoder's programs; says what they are."""
    sizes = checked.encoder
    assert sizes is not None
    buckets = EncoderBuckets.make(sizes.max_model_len, sizes.max_num_seqs, sizes.max_num_batched_tokens)
    unused = (
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "page_size",
        "kv_cache_dtype",
        "kv_cache_memory",
        "gpu_memory_utilization",
    )
    resolved = {**dict.fromkeys(unused), **_resolved(checked), "pooling": loaded.embedding.pooling}
    began = time.monotonic()
    models, tasks = (loaded.config, forms_of(loaded.model)), checked.opened.family.tasks
    labels = LabelHead.of(loaded.config) if "classify" in tasks else None
    runner = EncoderRunner(
        loaded.model,
        buckets,
        ProgramCache(checked.programs, fingerprint(checked.config, models, buckets, resolved)),
        classifies=labels is not None,
        head=loaded.embedding,
        mesh=checked.server_mesh,
    )
    with progress_bar(checked.config.progress) as on_done:
        runner.compile(on_done)
    say(f"compiled {len(buckets.buckets)} batch shapes in {time.monotonic() - began:.1f} s")
    phases.record("compile", time.monotonic() - began)
    return CompiledEncoder(runner, _encoder_info(checked, labels, runner.num_parameters), labels)


def _encoder_info(checked: Checked, labels: LabelHead | None, num_parameters: int) -> EngineInfo:
    assert checked.encoder is not None
    return EngineInfo(
        **facts_of(checked),
        **vars(checked.encoder),
        page_size=0,
        num_pages=0,
        num_parameters=num_parameters,
        tasks=tuple(
            task for task in checked.opened.family.tasks if task != "score" or (labels is not None and labels.scores)
        ),
        labels=() if labels is None else labels.labels,
        **checked.opened.embedding.facts(),
    )


def _senses(tower: CheckedTower | None) -> dict[str, Any]:
    """What `EngineInfo` says of images and sound."""
    if tower is None:
        return {}
    if tower.shape.lasting:
        return {"modalities": ("sound",), "tasks": ("transcribe",)}
    reads = ("audio",) if tower.family.reads == "audio" else ("image", "video") if tower.family.videos else ("image",)
    reads += () if tower.shape.ears is None else ("audio",)
    return {"modalities": reads, "media_patches": tower.shape.most_patches}


def _pages_in_words(checked: Checked, loaded: LoadedModel, sizes: Sizes, replicas: int) -> str:
    groups = KVGroups.of(loaded.model.kv_specs(), sizes.layers_per_page)
    return (
        f"KV cache: {sizes.num_pages} pages of {sizes.page_size} tokens{_what_pages_hold(groups)}, "
        f"{in_words(sizes.num_pages * sizes.page_bytes)} ({sizes.kv_dtype}); up to {sizes.max_num_seqs} requests at once, "
        f"{sizes.max_model_len} tokens each"
        + _states_in_words(loaded, sizes)
        + (f"; all of it in each of {replicas} replicas" if replicas > 1 else "")
    )


def _states_in_words(loaded: LoadedModel, sizes: Sizes) -> str:
    """What recurrent layers take besides."""
    spec = recurrent_of(loaded.model)
    if spec is None:
        return ""
    return (
        f"; {in_words((sizes.max_num_seqs + 1) * spec.state_bytes)} of states of recurrent layers, and "
        f"{sizes.num_snapshots} snapshots of them, {in_words(sizes.num_snapshots * spec.state_bytes)}"
    )


def _what_pages_hold(groups: KVGroups) -> str:
    """Where layers are in groups: for how many layers a page holds tokens, and what groups attend to."""
    if groups.places is None:
        return ""
    counts = Counter(groups.windows)
    kinds = ", ".join(f"{n} {f'with a window of {w}' if w else 'that see all'}" for w, n in counts.items())
    alike = "" if not groups.arrays[0].kinds else ", more of those that keep less"
    return f" for {len(groups.arrays)} layers{alike} ({len(groups.windows)} groups of layers: {kinds})"


@contextlib.contextmanager
def progress_bar(shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """What compilation tells (done, total) to: a tqdm bar, or nothing."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="compiling", unit="program", file=sys.stderr) as bar:

        def on_done(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield on_done
