"""Metrics for Prometheus and logs. Wrap the engine once, `client = MeteredClient(client)`, and every entry counts."""

from serving.metrics.metered import MeteredClient
from serving.metrics.metrics import Metrics

__all__ = ["MeteredClient", "Metrics"]
