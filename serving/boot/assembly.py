"""From a configuration to a model on devices, a compiled runner and a scheduler. Everything slow at start is here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from serving.engine.api import phases
from serving.engine.api.config import EngineConfig
from serving.engine.api.types import EngineInfo
from serving.engine.device.group import Meet
from serving.installation import cache_folder, version


def prepare_platform(config: EngineConfig) -> None:
    """Settings that must come before JAX touches a device.

    Raises:
        ValueError: cpu_devices asked for after JAX has started with another number.
    """
    import jax

    if config.cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        except RuntimeError as e:
            if len(jax.devices("cpu")) != config.cpu_devices:
                raise ValueError(
                    f"cpu_devices is {config.cpu_devices}, but JAX has already started with {len(jax.devices('cpu'))}: "
                    f"set it before anything uses JAX in this process."
                ) from e
    folder = compile_cache_folder(config)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "small"))
        # The default thresholds (1 s) would store nothing here.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_cache_folder(config: EngineConfig) -> Any:
    if config.compile_cache == "":
        return None
    return pathlib.Path(config.compile_cache) if config.compile_cache else cache_folder() / "programs"


def model_loader(config: EngineConfig) -> Callable[[str | None], Any]:
    """How to read a checkpoint (None: the configuration's own) as `assemble` read the first: same dtype, quantization and
    placement."""

    def load(name: str | None) -> Any:
        import jax

        from models.loading.load import load_model, resolve
        from serving.engine.device.sizing import resolve_dtype, resolve_quantization
        from sharding.mesh import make_mesh

        platform, mesh = jax.default_backend(), make_mesh(config.mesh)
        return load_model(
            resolve(config.model if name is None else name),
            dtype=resolve_dtype(config, platform),
            mesh=mesh,
            quantization=resolve_quantization(config, platform, mesh.size),
            max_model_len=config.max_model_len,
            progress=False,
        ).model

    return load


def assemble(
    config: EngineConfig, say: Callable[[str], None], opened: Any = None, meet: Meet | None = None
) -> tuple[Any, Any, Any, EngineInfo]:
    """Loads the model, sizes the pool, compiles. Returns (loaded model, runner, scheduler, info).

    Args:
        opened: the checkpoint's headers (`models.loading.load.Opened`), where they have been read before.
        meet: with several processes, `Group.least`. All assemble the same; a follower has no use for the scheduler.
    """
    prepare_platform(config)
    import jax

    from models.loading.load import load_model, resolve
    from models.pooling import pooling_mode
    from ops import native
    from ops.paged_attention import KVGroups
    from serving.engine.device.bundle import Bundle
    from serving.engine.device.compiling import ProgramCache
    from serving.engine.device.executor import Executor
    from serving.engine.device.placement import num_replicas
    from serving.engine.device.runner import ModelRunner
    from serving.engine.device.sizing import GIB, resolve_dtype, resolve_quantization, resolve_sizes
    from serving.engine.requests.buckets import ACCELERATOR_RIDGE, CPU_RIDGE
    from serving.engine.scheduling.scheduler import Scheduler, SchedulerConfig
    from sharding.mesh import make_mesh

    bundle = None if config.compiled is None else Bundle.read(config.compiled)
    if bundle is not None:
        config = bundle.apply(config)
    platform = jax.default_backend()
    mesh = make_mesh(config.mesh)
    dtype = resolve_dtype(config, platform)
    quantization = resolve_quantization(config, platform, mesh.size)
    if platform == "cpu":
        say(native.status())
    began = time.monotonic()
    loaded = load_model(
        resolve(config.model) if opened is None else opened.source,
        dtype=dtype,
        mesh=mesh,
        quantization=quantization,
        max_model_len=config.max_model_len,
        progress=config.progress,
        opened=opened,
    )
    say(
        f"loaded {loaded.model_id} ({loaded.config.architecture}, {dtype}{', ' + quantization if quantization else ''}) "
        f"in {time.monotonic() - began:.1f} s"
    )
    phases.record("load", time.monotonic() - began)

    positions = loaded.config.longest_positions if config.max_model_len else loaded.config.max_positions
    sizes = resolve_sizes(config, loaded.model, positions, dtype, mesh, meet)
    replicas = num_replicas(mesh)
    if replicas > 1 and config.kv_offload_gb > 0:
        raise ValueError("--kv-offload-gb works with one replica only; leave data out of --mesh, or do without it.")
    groups = KVGroups.of(loaded.model.kv_specs(), sizes.layers_per_page)
    say(
        f"KV cache: {sizes.num_pages} pages of {sizes.page_size} tokens{_what_pages_hold(groups)}, "
        f"{sizes.num_pages * sizes.page_bytes / GIB:.2f} GiB ({sizes.kv_dtype}); up to {sizes.max_num_seqs} requests at once, "
        f"{sizes.max_model_len} tokens each" + (f"; all of it in each of {replicas} replicas" if replicas > 1 else "")
    )
    began = time.monotonic()
    fingerprint = repr(
        (
            loaded.config,
            sizes,
            dtype,
            quantization,
            str(mesh),
            config.attention_backend,
            sorted(
                (k, v)
                for k, v in os.environ.items()
                if k.startswith(("JAXSERVE_", "XLA_FLAGS")) and not k.endswith("_KEY")
            ),
        )
    )
    if bundle is None:
        cache = ProgramCache(compile_cache_folder(config), fingerprint)
    else:
        bundle.check(loaded.config, sizes)
        cache = bundle.sealed()
    executor = Executor(
        loaded.model,
        sizes,
        cache,
        mesh=mesh if mesh.size > 1 else None,
        attention_backend=config.attention_backend,
        host_tier=config.kv_offload_gb > 0,
        num_scheduler_steps=config.num_scheduler_steps,
    )
    with progress_bar(config.progress) as on_done:
        executor.compile(on_done, meet)
    runner = ModelRunner(executor)
    say(f"compiled {len(runner.buckets.buckets)} step shapes in {time.monotonic() - began:.1f} s")
    phases.record("compile", time.monotonic() - began)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=sizes.max_num_seqs,
            max_num_batched_tokens=sizes.max_num_batched_tokens,
            max_chunk_tokens=runner.buckets.max_chunk,
            max_chunk_rows=runner.buckets.max_rows,
            max_model_len=sizes.max_model_len,
            page_size=sizes.page_size,
            num_pages=sizes.num_pages,
            policy=config.policy,
            enable_prefix_caching=config.enable_prefix_caching,
            seed=config.seed,
            num_scheduler_steps=config.num_scheduler_steps,
            prefix_first=config.prefix_first,
            fair_share=config.fair_share,
            host_pages=int(config.kv_offload_gb * GIB // sizes.page_bytes),
            restore_page_s=executor.store.restore_page_s if executor.store is not None else 0.0,
            windows=executor.groups.windows,
            max_waiting_time=config.max_waiting_time,
            max_running_time=config.max_running_time,
            replicas=replicas,
            buckets=dataclasses.replace(runner.buckets, ridge=CPU_RIDGE if platform == "cpu" else ACCELERATOR_RIDGE),
        )
    )
    info = EngineInfo(
        model_id=config.served_model_name or loaded.model_id,
        architecture=loaded.config.architecture,
        vocab_size=loaded.config.vocab_size,
        max_model_len=sizes.max_model_len,
        max_num_seqs=sizes.max_num_seqs * replicas,
        max_num_batched_tokens=sizes.max_num_batched_tokens * replicas,
        page_size=sizes.page_size,
        num_pages=scheduler.pool.num_pages,
        dtype=dtype,
        quantization=quantization,
        mesh=config.mesh,
        platform=platform,
        version=version(),
        num_parameters=executor.num_parameters,
        pooling=pooling_mode(loaded.source.path, "last"),
    )
    return loaded, runner, scheduler, info


def _what_pages_hold(groups: Any) -> str:
    """Where layers are in groups: for how many layers a page holds tokens, and what groups attend to."""
    if groups.places is None:
        return ""
    counts = Counter(groups.windows)
    kinds = ", ".join(f"{n} {f'with a window of {w}' if w else 'that see all'}" for w, n in counts.items())
    return f" for {len(groups.arrays)} layers ({len(groups.windows)} groups of layers: {kinds})"


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
