"""Run as a script beside a server that logs JSON: reads what its libraries write to standard error, line by line, and writes one
JSON object for each to standard output.

A process of its own, not a thread: a server that is killed by one of its libraries takes its threads along, and what that
library said last would be lost. It ends when the last process that can write to the pipe has ended, and ignores the
signals that end the server. Only the standard library, and little of that.
"""

import itertools
import json
import re
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # ECMA-48: colours, and what moves a cursor
ABSL = re.compile(r"([IWEF])\d{4} [\d:.]+ +\d+ \S+:\d+\] |([IWEF])\d{8} ")  # how gRPC's and XLA's own lines begin
SAYS = re.compile(r"\s*(?:\S+: )?(error|warning|fatal)\b", re.I)
LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical", "fatal": "critical"}
TRACEBACK = "Traceback (most recent call last):"
MAX_TRACEBACK_LINES = 500
END = "\0end of the log\n"
"""The line with which the server says that it ends: processes that it started may hold the pipe open for longer."""


def entries(lines: Iterable[str]) -> Iterator[str]:
    """JSON for each line. What is JSON already passes; a traceback is one entry; of a progress bar, only its last state is."""
    trace: list[str] = []
    for raw in lines:
        line = ANSI.sub("", raw.rstrip("\r\n").rpartition("\r")[2])
        if trace:
            trace.append(line)
            if line[:1] in (" ", "") and len(trace) < MAX_TRACEBACK_LINES:
                continue
            yield entry("\n".join(trace), "error")
            trace = []
        elif line == TRACEBACK:
            trace = [line]
        elif _is_entry(line):
            yield line
        elif line.strip():
            yield entry(line, level_of(line))
    if trace:
        yield entry("\n".join(trace), "error")


def level_of(line: str) -> str:
    """What a line says of itself: absl's letter, or "error:" and "warning:" at its beginning."""
    if found := ABSL.match(line):
        return LEVELS[found[1] or found[2]]
    if found := SAYS.match(line):
        return LEVELS.get(found[1].lower(), found[1].lower())
    return "info"


def entry(message: str, level: str) -> str:
    """As serving.metrics.logs writes its own."""
    now = time.time()
    clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": clock, "level": level, "logger": "stderr", "message": message}, ensure_ascii=False)


def _is_entry(line: str) -> bool:
    if not line.startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def main(stdin: TextIO = sys.stdin, stdout: TextIO = sys.stdout) -> None:
    """Until the end of the input."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stdin.reconfigure(encoding="utf-8", errors="replace", newline="\n")  # type: ignore[attr-defined]
    stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[attr-defined]
    for line in entries(itertools.takewhile(lambda raw: raw != END, iter(stdin.readline, ""))):
        stdout.write(line + "\n")
        stdout.flush()


if __name__ == "__main__":
    main()
