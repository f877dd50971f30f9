"""Publishes page events over ZeroMQ: PUB for what happens, ROUTER for what somebody missed, numbered as vLLM does.

A message is three frames: the topic, the batch's number (8 bytes, big-endian), the batch. Whoever sends a number to the replay
socket gets every kept batch from that on, and at the end one with the number -1.
"""

from __future__ import annotations

import logging
import threading
from collections import deque

import zmq

from serving.engine.api.page_events import PageBatch, PageEvents
from serving.kv_events.config import KVEventsConfig
from serving.kv_events.messages import Encoder

log = logging.getLogger(__name__)

END = (-1).to_bytes(8, "big", signed=True)
LOOK_MS = 20


class ZmqPublisher:
    """Follows an engine's page events on a thread of its own: sockets belong to one thread.

    Args:
        replicas: each publishes at the endpoint's port plus its number.
    Raises:
        ValueError: an endpoint that cannot be used, in a sentence.
    """

    def __init__(self, config: KVEventsConfig, events: PageEvents, replicas: int = 1) -> None:
        self._config = config
        self._events = events
        self._encoder = Encoder(config.encoding == "map")
        self._topic = config.topic.encode()
        self._queue: deque[PageBatch] = deque()
        self._wake = threading.Event()
        self._stopped = False
        self._context = zmq.Context()
        self._publishers: list[zmq.Socket[bytes]] = []
        self._replays: list[zmq.Socket[bytes]] = []
        try:
            for replica in range(replicas):
                self._publishers.append(self._socket(zmq.PUB, offset(config.endpoint, replica)))
                if config.replay_endpoint is not None:
                    self._replays.append(self._socket(zmq.ROUTER, offset(config.replay_endpoint, replica)))
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ValueError(f"kv_events_config: the endpoint cannot be used ({error}).") from None
        self._thread = threading.Thread(target=self._run, name="jaxserve-kv-events", daemon=True)

    @property
    def endpoints(self) -> list[str]:
        """Where the PUB sockets really are."""
        return [_text(one.getsockopt(zmq.LAST_ENDPOINT)) for one in self._publishers]

    @property
    def replay_endpoints(self) -> list[str]:
        """Where the ROUTER sockets really are."""
        return [_text(one.getsockopt(zmq.LAST_ENDPOINT)) for one in self._replays]

    def start(self) -> None:
        """Begins to publish."""
        self._events.follow(self._take)
        self._thread.start()

    def close(self) -> None:
        """Publishes what there is, and closes the sockets."""
        self._events.leave(self._take)
        self._stopped = True
        self._wake.set()
        self._thread.join(5.0)
        self._context.destroy(linger=0)

    def _take(self, batch: PageBatch) -> None:
        if not batch.snapshot:  # which subscribers of vLLM's do not know: they ask for a replay
            self._queue.append(batch)
            self._wake.set()

    def _run(self) -> None:
        while True:
            stopped = self._stopped
            self._wake.wait(LOOK_MS / 1000 if self._replays else None)
            self._wake.clear()
            while self._queue:
                batch = self._queue.popleft()
                for replica, socket in enumerate(self._publishers):
                    socket.send_multipart((self._topic, _number(batch), self._encoder.encode(batch, replica)))
            for replica, socket in enumerate(self._replays):
                try:
                    while socket.poll(0):
                        self._replay(socket, replica)
                except zmq.ZMQError as error:
                    log.warning("a replay of KV events failed: %s", error)
            if stopped:
                return

    def _replay(self, socket: zmq.Socket[bytes], replica: int) -> None:
        frames = socket.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            log.warning("a request for KV events is not one: %d frames", len(frames))
            return
        who, between, first = frames
        for batch in self._events.since(int.from_bytes(first, "big")):
            socket.send_multipart((who, between, _number(batch), self._encoder.encode(batch, replica)))
        socket.send_multipart((who, between, END, b""))

    def _socket(self, kind: int, endpoint: str) -> zmq.Socket[bytes]:
        socket = self._context.socket(kind)
        socket.set_hwm(self._config.hwm)
        if kind == zmq.ROUTER or any(part in endpoint for part in ("*", "::", "ipc://", "inproc://")):
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
        return socket


def offset(endpoint: str, replica: int) -> str:
    """A replica's endpoint: the port plus its number.

    Raises:
        ValueError: it has no port.
    """
    if not replica:
        return endpoint
    if not endpoint.startswith("tcp://"):
        return f"{endpoint}_dp{replica}"
    head, _, port = endpoint.rpartition(":")
    if not port.isdigit():
        raise ValueError(
            f"kv_events_config: the endpoint {endpoint!r} has no port to count on from for replica {replica}."
        )
    return f"{head}:{int(port) + replica}"


def _number(batch: PageBatch) -> bytes:
    return batch.sequence.to_bytes(8, "big")


def _text(value: object) -> str:
    return value.decode().rstrip("\0") if isinstance(value, bytes) else str(value)
