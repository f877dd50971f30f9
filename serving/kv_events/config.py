"""`--kv-events-config`: what of vLLM's KV events is published, and where."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

PUBLISHERS = ("zmq", "null")
ENCODINGS = ("array", "map")


@dataclasses.dataclass(frozen=True)
class KVEventsConfig:
    """Names and defaults are vLLM's, but for the last one.

    Attributes:
        enable_kv_cache_events: whether the engine tells of its pages at all; over gRPC it then does in any case.
        publisher: "zmq", or "null" for gRPC alone.
        endpoint: of the PUB socket: bound where it has a `*` or `::` or is ipc or inproc, else connected to.
        replay_endpoint: of the ROUTER socket that sends again what somebody missed; None for none.
        buffer_steps: batches that are kept for that.
        hwm: messages that ZeroMQ holds for a subscriber that is slow.
        max_queue_size: taken, and not looked at: nothing is queued in front of the socket.
        topic: the first frame of every message; "kv@POD@MODEL" is what llm-d subscribes to.
        encoding: structs as arrays (what llm-d and Dynamo read), or as maps (what later vLLM sends).
    Raises:
        ValueError: naming the field.
    """

    enable_kv_cache_events: bool = False
    publisher: str = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    buffer_steps: int = 10_000
    hwm: int = 100_000
    max_queue_size: int = 100_000
    topic: str = ""
    encoding: str = "array"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, usual = getattr(self, field.name), field.default
            kind = str if field.name == "replay_endpoint" else type(usual)
            if type(value) is not kind and not (value is None and usual is None):
                raise ValueError(f"kv_events_config: {field.name} must be of type {kind.__name__}, got {value!r}.")
            if isinstance(value, int) and kind is int and value < 1:
                raise ValueError(f"kv_events_config: {field.name} must be at least 1, got {value}.")
        if self.publisher not in PUBLISHERS:
            raise ValueError(
                f"kv_events_config: publisher must be one of {', '.join(PUBLISHERS)}, got {self.publisher!r}."
            )
        if self.encoding not in ENCODINGS:
            raise ValueError(
                f"kv_events_config: encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}."
            )

    @classmethod
    def of(cls, text: str | None) -> KVEventsConfig:
        """From the flag's JSON.

        Raises:
            ValueError: no JSON object, a field that there is not, or a value that it does not take.
        """
        if text is None:
            return cls()
        try:
            given: Any = json.loads(text)
        except ValueError as error:
            raise ValueError(f"kv_events_config is no JSON ({error}).") from None
        if not isinstance(given, dict):
            raise ValueError(f"kv_events_config must be a JSON object, got {text!r}.")
        known = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in known:
                raise ValueError(f"kv_events_config has no field {name!r}; it takes {', '.join(known)}.")
        return cls(**given)
