"""python tests/mock_launch.py [flags of serving.launch]: the real server process around a mock engine.

MOCK_LAUNCH in the environment is JSON: start_s (seconds that start-up takes), fail (start-up's error), reply, step_s,
die_after_s.
"""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import sys
import threading
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from serving.boot import startup
from tests.mock_engine import MockEngine, MockTemplate, MockTokenizer

OPTIONS = json.loads(os.environ.get("MOCK_LAUNCH", "{}"))


class Engine:
    """What `serving.launch` uses of an engine."""

    def __init__(self) -> None:
        self.client = MockEngine(OPTIONS.get("reply"), step_s=OPTIONS.get("step_s", 0.0), max_model_len=4096)
        self.died = threading.Event()
        self.recent: tuple[Any, ...] = ()
        self.busy_since: float | None = None
        if "die_after_s" in OPTIONS:
            threading.Timer(OPTIONS["die_after_s"], self._die).start()

    @property
    def failure(self) -> BaseException | None:
        return self.client.failure

    def shutdown(self) -> None:
        print("engine shut down", file=sys.stderr)

    def _die(self) -> None:
        self.client.die()
        self.died.set()


def start(config: Any, *, say: Any, **kwargs: Any) -> startup.Started:
    time.sleep(OPTIONS.get("start_s", 0.0))
    if "fail" in OPTIONS:
        raise ValueError(OPTIONS["fail"])
    say("loaded the mock")
    engine: Any = Engine()
    tokenizer: Any = MockTokenizer()
    template: Any = MockTemplate()
    return startup.Started(engine, startup.TextSide(tokenizer, template), {})


if __name__ == "__main__":
    startup.start = start
    runpy.run_module("serving.launch", run_name="__main__", alter_sys=True)
