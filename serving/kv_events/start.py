"""Starts what `--kv-events-config` asks for beside an engine."""

from __future__ import annotations

import importlib.util

from serving.engine.cache.page_log import PageLog
from serving.installation import extra
from serving.kv_events.config import KVEventsConfig


def check_installed(config: KVEventsConfig) -> None:
    """Raises ValueError where a package is missing."""
    if not config.enable_kv_cache_events or config.publisher != "zmq":
        return
    for package in ("zmq", "msgspec"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"kv_events_config: publisher zmq needs pyzmq and msgspec: {extra('kv-events')}.")


class KVEvents:
    """The log of an engine's page events, and what publishes it.

    Raises:
        ValueError: an endpoint that cannot be used.

    Attributes:
        log: where the engine puts its events.
    """

    def __init__(self, config: KVEventsConfig, replicas: int) -> None:
        self.log = PageLog(config.buffer_steps)
        self._publisher = None
        if config.publisher == "zmq":
            from serving.kv_events.zmq_publisher import ZmqPublisher

            self._publisher = ZmqPublisher(config, self.log, replicas)

    def start(self) -> None:
        """Begins to publish."""
        self.log.start()
        if self._publisher is not None:
            self._publisher.start()

    def close(self) -> None:
        """Publishes what there is, and ends."""
        self.log.close()
        if self._publisher is not None:
            self._publisher.close()
