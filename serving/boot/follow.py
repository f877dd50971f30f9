"""One of the processes that only compute: it starts as process 0 does, and carries out what that one says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from serving.engine.api.config import EngineConfig
from serving.engine.device.followers import Meet
from sharding.processes import Processes


def run_follower(config: EngineConfig, processes: Processes, say: Callable[[str], None]) -> int:
    """Runs until process 0 ends. Returns the exit status: 0 when the engine was asked to stop."""
    from models.loading.source import resolve
    from serving.boot.platform import prepare_platform, programs_folder
    from serving.processes.start import follow

    def executor_of(meet: Meet) -> Any:
        from serving.boot.check import check
        from serving.boot.compile import compile_decoder
        from serving.boot.load import load
        from serving.engine.device.programs.compiling import starting

        with starting():
            checked = check(config, source, programs)
            return compile_decoder(checked, load(checked, say), say, meet).runner.executor

    try:
        source = resolve(config.model, progress=config.progress)
        programs = programs_folder(config, say)
        prepare_platform(config, programs)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    return follow(config, processes, source.path, executor_of, say)
