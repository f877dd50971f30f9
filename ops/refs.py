"""What a Pallas kernel sees of an array in memory."""

from __future__ import annotations

from typing import Any

Ref = Any
"""Indexed, loaded and stored. jax's own classes for it say nothing of types."""
