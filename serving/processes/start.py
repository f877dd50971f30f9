"""Starting one process of several: process 0 leads, the others follow until it ends."""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from serving.engine.api.config import EngineConfig
from serving.engine.device.followers import Meet
from serving.engine.requests.commands import DecodeLoop, Sample
from serving.processes.facts import facts
from serving.processes.follower import Follower
from serving.processes.leader import Leader
from serving.processes.watch import Patience, ProcessLostError
from sharding.processes import Processes, find, join, lookup, publish

_ADDRESS = "address of the commands"
_FIND_TIMEOUT_S = 60.0  # from having joined to process 0 having published its address
_CAUSE_S = 2.0  # a failed collective is mostly another process's death, which is reported a moment later
_FAILED = 1


def place_of(config: EngineConfig) -> Processes | None:
    """This process's place among several; None when it is alone.

    Raises:
        ValueError: flags that do not fit together, an environment in which nothing is found, or what several processes
            cannot do.
    """
    return find(config.coordinator, config.num_processes, config.process_id)


def lead(
    config: EngineConfig, processes: Processes, model: Path, on_loss: Callable[[str], None], say: Callable[[str], None]
) -> Leader:
    """Joins the others as process 0; returns when every follower has come with the same flags, code and model. JAX must not
    have touched a device yet.

    Args:
        model: the checkpoint's file or folder here.
        on_loss: called once, from any thread and at any time, when the engine cannot go on.
    Raises:
        ValueError: the others did not come.
        ProcessLostError: one came and does not fit, or died.
    """
    known = _join(config, processes, model, say)
    leader = Leader(processes.count, known, on_loss, Patience(step=config.step_timeout))
    loopback = processes.host in ("localhost", "127.0.0.1", "::1")
    port = leader.listen("127.0.0.1" if loopback else "[::]")
    host = f"[{processes.host}]" if ":" in processes.host else processes.host
    publish(_ADDRESS, f"{host}:{port}")
    leader.least("all are the same", 0)
    return leader


def follow(
    config: EngineConfig,
    processes: Processes,
    model: Path,
    assemble: Callable[[Meet], Any],
    say: Callable[[str], None],
) -> int:
    """Runs a follower until process 0 ends. Returns the exit status: 0 when the engine was asked to stop.

    Args:
        model: the checkpoint's file or folder here.
        assemble: loads and compiles the model, as process 0 does; returns its executor.

    For the main thread of a process of its own: a loss ends the process, because a thread that waits for another process's
    part of a collective cannot be woken.
    """

    def on_loss(reason: str) -> NoReturn:
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(_FAILED)

    follower = None
    try:
        known = _join(config, processes, model, say)
        address = lookup(_ADDRESS, _FIND_TIMEOUT_S)
        follower = Follower(address, processes.index, known, on_loss, Patience(step=config.step_timeout))
        follower.least("all are the same", 0)
        executor = assemble(follower.least)
        _leave_sigterm_to_process_0(say)
        say(f"process {processes.index} of {processes.count} follows")
        _carry_out(follower, executor)
    except ProcessLostError:
        time.sleep(_CAUSE_S)  # on_loss has said why, and ends the process
        return _FAILED
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if follower is not None:
            follower.close(str(error))
        return _FAILED
    except Exception as error:
        time.sleep(_CAUSE_S)  # on_loss ends the process meanwhile, with the cause, where there is one
        if follower is not None:
            follower.close(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    say("stopped")
    return 0


def _join(config: EngineConfig, processes: Processes, model: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Joins the others; what must be the same in all of them."""
    say(
        f"process {processes.index} of {processes.count}, by {processes.found_by}; "
        f"waiting for the others at {processes.coordinator}"
    )
    join(processes)
    return facts(config, model)


def _carry_out(follower: Follower, executor: Any) -> None:
    """Executes commands; tokens are read by a thread of its own, so that the next command need not wait for them."""
    sampled: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()

    def read() -> None:
        while True:
            number, tokens = sampled.get()
            follower.sampled(number, np.asarray(tokens))

    threading.Thread(target=read, name="jaxserve-digests", daemon=True).start()
    for command in follower.commands():
        result = executor.execute(command)
        if isinstance(command, Sample | DecodeLoop):
            result.tokens_finite.copy_to_host_async()
            sampled.put((executor.num_sampled, result.tokens_finite))


def _leave_sigterm_to_process_0(say: Callable[[str], None]) -> None:
    """Schedulers send SIGTERM to every process of a job: process 0 drains, and the others must live until it has."""

    def on_signal(number: int, frame: Any) -> None:
        signal.signal(number, lambda number, frame: os._exit(128 + number))
        say(f"{signal.Signals(number).name}: waiting for process 0 to end; again to stop at once")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)


__all__ = ["Leader", "ProcessLostError", "follow", "lead", "place_of"]
