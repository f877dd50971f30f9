"""Starts the engine that a model needs: one that generates, or one that reads."""

from __future__ import annotations

from collections.abc import Callable

from serving.engine.api.config import EngineConfig
from serving.engine.device.group import Group
from serving.engine.encoder.engine import EncoderEngine
from serving.engine.engine import Engine

AnyEngine = Engine | EncoderEngine


def start_engine(
    config: EngineConfig, progress: Callable[[str], None] | None = None, group: Group | None = None
) -> AnyEngine:
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
        return Engine.start(config, progress, opened=opened, group=group)
    if group is not None:
        raise ValueError(f"{opened.model_id} is an encoder; an encoder runs in a single process.")
    from serving.boot.encoder_assembly import assemble_encoder

    with starting():
        engine = EncoderEngine(config, *assemble_encoder(config, progress or (lambda line: None), opened))
    engine.start()
    return engine
