"""One of the processes that only compute: it assembles what process 0 assembles, and carries out what that one says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from serving.engine.api.config import EngineConfig
from serving.engine.device.group import Meet
from sharding.processes import Processes


def run_follower(config: EngineConfig, processes: Processes, say: Callable[[str], None]) -> int:
    """Runs until process 0 ends. Returns the exit status: 0 when the engine was asked to stop."""
    from models.loading.source import resolve
    from serving.boot.assembly import assemble, prepare_platform
    from serving.engine.device.compiling import starting
    from serving.processes.start import follow

    def executor_of(meet: Meet) -> Any:
        with starting():
            _, runner, _, _ = assemble(config, say, meet=meet)
        return runner.executor

    try:
        source = resolve(config.model, progress=config.progress)
        prepare_platform(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return follow(config, processes, source.path, executor_of, say)
