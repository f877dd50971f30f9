"""Process 0's side: sends every command to the followers, compares what they sample, and notices when one is lost."""

from __future__ import annotations

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any

import grpc
import numpy as np

from proto.jaxserve.v1 import processes_pb2 as pb
from proto.jaxserve.v1 import processes_pb2_grpc as rpc
from serving.engine.requests.commands import Command, DecodeLoop, Sample
from serving.processes.facts import difference
from serving.processes.watch import Patience, ProcessLostError, ProcessWatch, outgoing
from serving.processes.wire import digest, encode

OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))  # a mask has megabytes
STOP_S = 5.0  # how long followers have to end when asked to


@dataclasses.dataclass(slots=True)
class _Follower:
    index: int
    heard: float  # time.monotonic() of its last message
    outbox: queue.SimpleQueue[pb.FollowResponse | None] = dataclasses.field(default_factory=queue.SimpleQueue)
    arrivals: dict[str, int] = dataclasses.field(default_factory=dict)
    ended: threading.Event = dataclasses.field(default_factory=threading.Event)


@dataclasses.dataclass(slots=True)
class _Step:
    """A sampling command on its way: digests by process; it is done when all are there."""

    sent: float
    digests: dict[int, bytes] = dataclasses.field(default_factory=dict)


class Leader(rpc.ProcessesServicer):
    """A `serving.engine.device.followers.Followers` over gRPC. Usable from any thread.

    Args:
        count: processes of the engine, this one included.
        facts: what must be the same everywhere, see `facts.facts`.
        on_loss: called once, with a sentence, when the engine cannot go on. The followers have been told then.
    """

    def __init__(
        self, count: int, facts: Mapping[str, str], on_loss: Callable[[str], None], patience: Patience | None = None
    ) -> None:
        self._count = count
        self._facts = facts
        self._on_loss = on_loss
        self._patience = patience or Patience()
        self._changed = threading.Condition()  # guards everything below
        self._followers: dict[int, _Follower] = {}
        self._steps: dict[int, _Step] = {}
        self._num_sampled = 0
        self._lost: str | None = None
        self._stopping = False
        self._server: Any = None
        self._watch = ProcessWatch(self._look, self.lose)

    # ---- life ----

    def listen(self, host: str) -> int:
        """Starts to serve followers; the port."""
        self._server = grpc.server(
            futures.ThreadPoolExecutor(self._count + 1, thread_name_prefix="jaxserve-leader"), options=OPTIONS
        )
        rpc.add_ProcessesServicer_to_server(self, self._server)
        port = self._server.add_insecure_port(f"{host}:0")
        self._server.start()
        return port

    def stop(self, reason: str = "") -> None:
        """Ends the followers, and waits a moment for them. With a reason, they end as failed."""
        with self._changed:
            self._stopping = True
            followers = list(self._followers.values())
        self._watch.stop()
        end = pb.FollowResponse(end=pb.End(reason=reason))
        for follower in followers:
            follower.outbox.put(end)
            follower.outbox.put(None)
        deadline = time.monotonic() + STOP_S
        for follower in followers:
            follower.ended.wait(max(0.0, deadline - time.monotonic()))
        if self._server is not None:
            self._server.stop(0)

    def lose(self, reason: str) -> None:
        """Gives the engine up: tells the followers and the owner why. Only the first reason counts."""
        with self._changed:
            if self._lost is not None or self._stopping:
                return
            self._lost = reason
            self._changed.notify_all()
            followers = list(self._followers.values())
        for follower in followers:
            follower.outbox.put(pb.FollowResponse(end=pb.End(reason=reason)))
            follower.outbox.put(None)
        self._on_loss(reason)

    # ---- Followers ----

    def least(self, point: str, value: int) -> int:
        """See Followers.least.

        Raises:
            ProcessLostError: one will never come.
        """

        def all_there() -> bool:
            arrived = sum(point in f.arrivals for f in self._followers.values())
            return self._lost is not None or arrived == self._count - 1

        with self._changed:
            self._changed.wait_for(all_there)
            if self._lost is not None:
                raise ProcessLostError(self._lost)
            followers = list(self._followers.values())
            least = min(value, *(f.arrivals.pop(point) for f in followers))
        for follower in followers:
            follower.outbox.put(pb.FollowResponse(departure=pb.Departure(point=point, value=least)))
        return least

    def send(self, command: Command) -> None:
        """See Followers.send."""
        message = pb.FollowResponse(command=encode(command))
        with self._changed:
            if isinstance(command, Sample | DecodeLoop):
                self._num_sampled += 1
                self._steps[self._num_sampled] = _Step(time.monotonic())
            followers = list(self._followers.values())
        for follower in followers:
            follower.outbox.put(message)

    def sampled(self, number: int, tokens: np.ndarray) -> None:
        """See Followers.sampled."""
        self._compare(0, number, digest(tokens))

    def _compare(self, process: int, number: int, found: bytes) -> None:
        """Takes in one process's digest of a step; all must be the same."""
        with self._changed:
            step = self._steps.get(number)
            if step is None:
                return
            step.digests[process] = found
            same = len(set(step.digests.values())) == 1
            if same and len(step.digests) == self._count:
                del self._steps[number]
        if not same:
            self.lose(
                f"process {process} sampled other tokens than the rest in step {number}: the processes have diverged "
                "(different hardware, memory errors, or a defect)."
            )

    # ---- followers ----

    def Follow(  # noqa: N802
        self, request_iterator: Iterator[pb.FollowRequest], context: Any
    ) -> Iterator[pb.FollowResponse]:
        """The stream of one follower."""
        hello = next(iter(request_iterator), pb.FollowRequest()).hello
        follower = _Follower(hello.process_id, time.monotonic())
        refusal = self._enter(follower, hello)
        if refusal is not None:
            yield pb.FollowResponse(end=pb.End(reason=refusal))
            if len(self._followers) < self._count - 1:  # a stranger cannot end an engine that is complete
                self.lose(refusal)
            return
        threading.Thread(target=self._read, args=(follower, request_iterator), daemon=True).start()
        yield pb.FollowResponse(welcome=pb.Welcome())
        yield from outgoing(follower.outbox, pb.FollowResponse(heartbeat=pb.Heartbeat()))
        if self._stopping:  # JAX aborts a process whose coordinator is gone: the follower has to go first
            follower.ended.wait(STOP_S)

    def _enter(self, follower: _Follower, hello: pb.Hello) -> str | None:
        """Takes a follower in, or says why not."""
        if not 0 < follower.index < self._count:
            return f"a process calls itself {follower.index}; with {self._count} processes ids go to {self._count - 1}."
        reason = difference(follower.index, hello.facts, self._facts)
        if reason is not None:
            return reason
        with self._changed:
            if follower.index in self._followers:
                return f"two processes call themselves {follower.index}: give each its own --process-id."
            self._followers[follower.index] = follower
            self._changed.notify_all()
        return None

    def _read(self, follower: _Follower, messages: Iterator[pb.FollowRequest]) -> None:
        """Takes in what one follower says until it is gone."""
        reason = f"process {follower.index} is gone: its connection closed."
        try:
            for message in messages:
                follower.heard = time.monotonic()
                match message.WhichOneof("message"):
                    case "arrival":
                        with self._changed:
                            follower.arrivals[message.arrival.point] = message.arrival.value
                            self._changed.notify_all()
                    case "sampled":
                        self._compare(follower.index, message.sampled.number, message.sampled.digest)
                    case "end":
                        reason = f"process {follower.index} ended: {message.end.reason}"
                        break
        except Exception:  # grpc gives the iterator's end as various errors
            pass
        follower.ended.set()
        self.lose(reason)

    def _look(self, now: float) -> str | None:
        with self._changed:
            for follower in self._followers.values():
                silent = now - follower.heard
                if silent > self._patience.silence and not follower.ended.is_set():
                    return f"process {follower.index} has been silent for {silent:.1f} s."
            oldest = next(iter(self._steps.items()), None)
            if oldest is None or now - oldest[1].sent <= self._patience.step:
                return None
            late = [process for process in range(self._count) if process not in oldest[1].digests]
        return (
            f"step {oldest[0]} has not ended after {now - oldest[1].sent:.1f} s in process{'es' if len(late) > 1 else ''} "
            f"{', '.join(map(str, late))}."
        )
