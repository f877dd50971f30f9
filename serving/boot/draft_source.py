"""Where the draft that a configuration names is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from models.loading.source import ModelSource, resolve

if TYPE_CHECKING:
    from serving.engine.api.config import EngineConfig

NAMED = "speculative_config"


def draft_source(config: EngineConfig) -> ModelSource | None:
    """The checkpoint of the draft model, or of the head that has one of its own; None where the configuration names none.

    Raises:
        ValueError: there is nothing under that name.
    """
    how = config.speculative_config
    if how is None or how.model is None:
        return None
    return resolve(how.model, progress=config.progress, named=f"{NAMED}: model")
