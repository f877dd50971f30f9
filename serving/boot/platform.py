"""What must be settled before JAX touches a device, and where this machine keeps compiled programs."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.engine.api.config import EngineConfig
from serving.installation import cache_folder

if TYPE_CHECKING:
    from models.loading.kept.cache import WeightCache
    from models.loading.source import ModelSource

GIB = 1 << 30


def prepare_platform(config: EngineConfig, programs: pathlib.Path | None) -> None:
    """Settings that must come before JAX touches a device.

    Args:
        programs: from `programs_folder`.
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
    if programs is not None and os.access(programs, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(programs / "small"))
        # The default thresholds (1 s) would store nothing here.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def programs_folder(config: EngineConfig, say: Callable[[str], None]) -> pathlib.Path | None:
    """The folder of compiled programs; None where none are kept. One that cannot be written is no reason not to serve: it is
    said, with the flag, and what lies there already is used."""
    if config.compile_cache == "":
        return None
    folder = pathlib.Path(config.compile_cache or cache_folder() / "programs").expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        reason = None if os.access(folder, os.W_OK | os.X_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is None:
        return folder
    readable = folder.is_dir() and os.access(folder, os.R_OK | os.X_OK)
    say(
        f"compiled programs cannot be kept in {folder} ({reason}); "
        + ("those that lie there are used. " if readable else "every start compiles them anew. ")
        + "Name a folder with --compile-cache, or for all that is kept with JAXSERVE_CACHE in the environment"
    )
    return folder if readable else None


def weight_cache(config: EngineConfig, say: Callable[[str], None]) -> WeightCache | None:
    """Where converted weights are kept between starts; None where none are."""
    if config.weight_cache == "" or not config.weight_cache_gb:
        return None
    from models.loading.kept.cache import WeightCache

    folder = pathlib.Path(config.weight_cache or cache_folder() / "weights").expanduser()
    return WeightCache(folder, int(config.weight_cache_gb * GIB), say)


def read_ahead(config: EngineConfig, source: ModelSource, say: Callable[[str], None]) -> None:
    """Begins to read what a model's weights most likely are, where they were kept, beside what comes before loading them."""
    kept = weight_cache(config, say)
    if kept is not None and source.kind != "orbax":
        from models.loading.load import weight_files

        kept.expect(weight_files(source))
