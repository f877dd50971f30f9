"""The start of an engine: check, load, compile, wire. Each step has its file; this one walks them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from serving.engine.api.config import EngineConfig
from serving.engine.encoder.engine import EncoderEngine
from serving.engine.engine import Engine

if TYPE_CHECKING:
    from serving.boot.check import Checked
    from serving.engine.device.followers import Followers

AnyEngine = Engine | EncoderEngine
Progress = Callable[[str], None]
"""Told each step of the start as one line."""


def start_engine(config: EngineConfig, say: Progress = lambda line: None) -> AnyEngine:
    """An engine alone, without a text side. Blocks until ready.

    Raises:
        ValueError: a configuration or checkpoint that cannot be served, in a sentence.
    """
    from models.loading.source import resolve
    from serving.boot.check import check
    from serving.boot.platform import prepare_platform, programs_folder

    source = resolve(config.model, progress=config.progress)
    programs = programs_folder(config, say)
    prepare_platform(config, programs)
    return start_checked(check(config, source, programs), say)


def start_checked(checked: Checked, say: Progress, followers: Followers | None = None) -> AnyEngine:
    """Loads, compiles and wires what has been checked.

    Args:
        followers: the engine's other processes; this is the first.
    Raises:
        ValueError: weights that cannot be used, or a device with too little memory, in a sentence.
    """
    from serving.boot.compile import compile_decoder, compile_encoder
    from serving.boot.load import load, load_draft
    from serving.boot.platform import weight_cache
    from serving.boot.senses.tower import load_tower
    from serving.boot.wire import wire_decoder, wire_encoder
    from serving.engine.device.out_of_memory import explain
    from serving.engine.device.programs.compiling import starting
    from serving.engine.scheduling.recovery import is_out_of_memory

    kept = weight_cache(checked.config, say)
    with starting():
        try:
            loaded = load(checked, say, kept)
            if not checked.generates:
                return wire_encoder(checked, loaded, compile_encoder(checked, loaded, say))
            meet = None if followers is None else followers.least
            tower = load_tower(
                checked.tower, checked.opened, checked.server_mesh, checked.quantization, checked.config.progress, say
            )
            compiled = compile_decoder(checked, loaded, say, meet, load_draft(checked, loaded.model, say, kept), tower)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            import jax

            raise ValueError(explain(error, checked.config, jax.local_devices())) from error
        finally:
            if kept is not None:
                kept.finish()
    return wire_decoder(checked, loaded, compiled, followers)
