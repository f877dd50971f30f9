"""What decides a compiled program besides the code and the devices: under it programs are kept, and found again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import Scope, settings_of

PROGRAM_SETTINGS = tuple(name for name, known in settings_of(EngineConfig).items() if known.scope is Scope.PROGRAM)
"""Settings that programs are made with."""

ENVIRONMENT = ("JAXSERVE_NATIVE", "JAXSERVE_NATIVE_ISA", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables that programs are made with. Not "all of ours": keys are among those, and another key changes no program."""


def fingerprint(config: EngineConfig, model_config: Any, shapes: Any, resolved: Mapping[str, Any]) -> str:
    """Of everything that decides an engine's programs.

    Args:
        model_config: the models' own numbers, and how their weights are stored.
        shapes: what steps or batches are padded to.
        resolved: setting -> what it came to, where the configuration leaves it open; settings that `shapes` holds may be None.
    """
    settings = [(name, resolved.get(name, getattr(config, name))) for name in PROGRAM_SETTINGS]
    variables = [(name, os.environ.get(name)) for name in ENVIRONMENT]
    return repr((model_config, shapes, settings, variables))
