"""Counts of pages that travel, on the wire and off it."""

from __future__ import annotations

from proto.jaxserve.v1 import control_pb2 as pb
from serving.engine.api.peers.stats import REASONS, TransferStats

_PLAIN = tuple(name for name in TransferStats.__slots__ if name != "fallbacks")


def stats_to(stats: TransferStats) -> pb.TransferFigures:
    """The message; reasons that never occurred are left out."""
    fallbacks = {reason: n for reason, n in zip(REASONS, stats.fallbacks, strict=True) if n}
    return pb.TransferFigures(**{name: getattr(stats, name) for name in _PLAIN}, fallbacks=fallbacks)


def stats_from(figures: pb.TransferFigures) -> TransferStats:
    """From the message; reasons that we do not know are left out."""
    fallbacks = tuple(int(figures.fallbacks.get(reason, 0)) for reason in REASONS)
    return TransferStats(**{name: getattr(figures, name) for name in _PLAIN}, fallbacks=fallbacks)
