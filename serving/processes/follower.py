"""A follower's side: takes commands from process 0, and tells it what they gave."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import grpc
import numpy as np

from proto.jaxserve.v1 import processes_pb2 as pb
from proto.jaxserve.v1 import processes_pb2_grpc as rpc
from serving.engine.requests.commands import Command, DecodeLoop, Sample
from serving.processes.leader import OPTIONS
from serving.processes.watch import Patience, ProcessLostError, ProcessWatch, outgoing
from serving.processes.wire import decode, digest

CLOSE_S = 2.0


class Follower:
    """The connection to process 0.

    Args:
        address: "host:port" of process 0's stream.
        index: which process this is.
        facts: what must be the same everywhere, see `facts.facts`.
        on_loss: called once, with a sentence, when the engine cannot go on.
    """

    def __init__(
        self,
        address: str,
        index: int,
        facts: Mapping[str, str],
        on_loss: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        self._on_loss = on_loss
        self._patience = patience or Patience()
        self._outbox: queue.SimpleQueue[pb.FollowRequest | None] = queue.SimpleQueue()
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards everything below
        self._departures: dict[str, int] = {}
        self._steps: dict[int, float] = {}  # sampling commands on their way -> when they came
        self._num_sampled = 0
        self._lost: str | None = None
        self._ended = False
        self._closed = threading.Event()  # process 0 has ended the stream
        self._heard = time.monotonic()
        self._outbox.put(pb.FollowRequest(hello=pb.Hello(process_id=index, facts=facts)))
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        sent = outgoing(self._outbox, pb.FollowRequest(heartbeat=pb.Heartbeat()))
        self._call = rpc.ProcessesStub(self._channel).Follow(sent, wait_for_ready=True)
        threading.Thread(target=self._read, name="jaxserve-follower", daemon=True).start()
        self._watch = ProcessWatch(self._look, self.lose)

    def least(self, point: str, value: int) -> int:
        """See Followers.least.

        Raises:
            ProcessLostError: the others will never come.
        """
        self._outbox.put(pb.FollowRequest(arrival=pb.Arrival(point=point, value=value)))
        with self._changed:
            self._changed.wait_for(lambda: point in self._departures or self._lost is not None)
            if self._lost is not None:
                raise ProcessLostError(self._lost)
            return self._departures.pop(point)

    def commands(self) -> Iterator[Command]:
        """Commands in their order, until process 0 ends.

        Raises:
            ProcessLostError: it did not end in peace.
        """
        while (command := self._commands.get()) is not None:
            yield command
        with self._changed:
            if self._lost is not None:
                raise ProcessLostError(self._lost)

    def sampled(self, number: int, tokens: np.ndarray) -> None:
        """What the sampling command number `number` (from 1) gave here."""
        self._outbox.put(pb.FollowRequest(sampled=pb.Sampled(number=number, digest=digest(tokens))))
        with self._changed:
            self._steps.pop(number, None)

    def close(self, reason: str = "") -> None:
        """Says goodbye; with a reason, process 0 ends the engine for it."""
        with self._changed:
            self._ended = True
        self._watch.stop()
        if reason:
            self._outbox.put(pb.FollowRequest(end=pb.End(reason=reason)))
            self._closed.wait(CLOSE_S)  # process 0 has read it then
        self._outbox.put(None)
        self._channel.close()

    def lose(self, reason: str) -> None:
        """Gives the engine up. Only the first reason counts."""
        with self._changed:
            if self._lost is not None or self._ended:
                return
            self._lost = reason
            self._changed.notify_all()
        self._commands.put(None)
        self._on_loss(reason)

    def _read(self) -> None:
        reason = "process 0 is gone: its connection closed."
        try:
            for message in self._call:
                self._heard = time.monotonic()
                match message.WhichOneof("message"):
                    case "departure":
                        with self._changed:
                            self._departures[message.departure.point] = message.departure.value
                            self._changed.notify_all()
                    case "command":
                        self._take(decode(message.command))
                    case "end":
                        reason = message.end.reason
                        break
        except (grpc.RpcError, ValueError) as e:
            reason = str(e) if isinstance(e, ValueError) else reason
        self._closed.set()
        if reason:
            self.lose(reason)
        else:
            with self._changed:
                self._ended = True
            self._commands.put(None)

    def _take(self, command: Command) -> None:
        if isinstance(command, Sample | DecodeLoop):
            with self._changed:
                self._num_sampled += 1
                self._steps[self._num_sampled] = time.monotonic()
        self._commands.put(command)

    def _look(self, now: float) -> str | None:
        silent = now - self._heard
        if silent > self._patience.silence:
            return f"process 0 has been silent for {silent:.1f} s."
        with self._changed:
            oldest = next(iter(self._steps.items()), None)
        if oldest is not None and now - oldest[1] > self._patience.step:
            return f"step {oldest[0]} has not ended after {now - oldest[1]:.1f} s."
        return None
