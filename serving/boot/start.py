"""Starts the engine that a model needs: one that generates, or one that reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serving.engine.api.config import EngineConfig
from serving.engine.device.group import Group
from serving.engine.device.out_of_memory import explain
from serving.engine.encoder.engine import EncoderEngine
from serving.engine.engine import Engine
from serving.engine.rehearsal import rehearse
from serving.engine.scheduling.recovery import is_out_of_memory

AnyEngine = Engine | EncoderEngine
Progress = Callable[[str], None]
"""Told each step of the start as one line."""

REHEARSAL_S = 600.0
"""How long a request of two tokens may take on the slowest device before the start counts as failed."""


def start_engine(config: EngineConfig, progress: Progress | None = None, group: Group | None = None) -> AnyEngine:
    """Loads, compiles and starts. Blocks until ready.

    Args:
        progress: told each step of the start as one line.
        group: the engine's other processes; this is the first.
    Raises:
        ValueError: a configuration or checkpoint that cannot be served, in a sentence.
    """
    from models.loading.load import open_checkpoint, resolve
    from serving.boot.assembly import prepare_platform
    from serving.engine.device.compiling import starting

    prepare_platform(config)
    opened = open_checkpoint(resolve(config.model, progress=config.progress))
    if "generate" in opened.family.tasks:
        return start_decoder(config, progress, opened=opened, group=group)
    if group is not None:
        raise ValueError(f"{opened.model_id} is an encoder; an encoder runs in a single process.")
    from serving.boot.encoder_assembly import assemble_encoder

    with starting():
        engine = EncoderEngine(config, *assemble_encoder(config, progress or (lambda line: None), opened))
    engine.start()
    return engine


def start_decoder(
    config: EngineConfig, progress: Progress | None = None, *, opened: Any = None, group: Group | None = None
) -> Engine:
    """As `start_engine`, for a model that generates.

    Args:
        opened: what `models.loading.load.open_checkpoint` gave, where that was called before.
    """
    from serving.boot.assembly import assemble, model_loader
    from serving.engine.device.compiling import starting

    with starting():
        meet = None if group is None else group.least
        try:
            parts = assemble(config, progress or (lambda line: None), opened, meet)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            import jax

            raise ValueError(explain(error, config, jax.local_devices())) from error
        engine = Engine(config, *parts, load_model=model_loader(config))
    if group is not None:
        engine.runner.executor.lead(group)
    engine.loop.start()
    try:
        engine.call(lambda: rehearse(engine.scheduler, engine.runner), timeout=REHEARSAL_S)
    except BaseException:
        engine.shutdown()
        raise
    return engine
