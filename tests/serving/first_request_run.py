"""python -m tests.serving.first_request_run [flags of serving.launch]: the server, which from its readiness on says on standard
error which modules it imports and which Python code it compiles."""

from __future__ import annotations

import sys
from typing import Any

from serving import launch

ready = False


def _say(event: str, args: tuple[Any, ...]) -> None:
    if ready and event in ("import", "compile"):
        print("LATE", event, args[0] if event == "import" else args[1], file=sys.stderr, flush=True)


class _Server(launch.Server):
    def _say(self, line: str) -> None:
        global ready
        ready = ready or line.startswith("ready at")
        super()._say(line)


if __name__ == "__main__":
    sys.addaudithook(_say)
    launch.Server = _Server  # type: ignore[misc]
    launch.cli()
