"""python -m tests.serving.first_request_run [flags of serving.launch]: the server, which from its readiness on says on standard
error which modules it imports and which Python code it compiles, and then which dear ones it has imported before."""

from __future__ import annotations

import sys
from typing import Any

from serving import launch

DEAR = ("orbax", "tensorstore", "matplotlib", "transformers", "torch")
"""What takes a third of a second and more to import, and no start from weight files needs."""

ready = False


def _say(event: str, args: tuple[Any, ...]) -> None:
    if ready and event in ("import", "compile"):
        print("LATE", event, args[0] if event == "import" else args[1], file=sys.stderr, flush=True)


class _Server(launch.Server):
    def _say(self, line: str) -> None:
        global ready
        if line.startswith("ready at"):
            print(*("DEAR " + name for name in DEAR if name in sys.modules), sep="\n", file=sys.stderr)
            ready = True
        super()._say(line)


if __name__ == "__main__":
    sys.addaudithook(_say)
    launch.Server = _Server  # type: ignore[misc]
    launch.cli()
