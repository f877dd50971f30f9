"""What a step takes, by how many rows and places it has: measured once at start, and kept up with the steps that run."""

from __future__ import annotations

from collections.abc import Iterable

from serving.engine.requests.buckets import STEP_OVERHEAD, Bucket, BucketTable

WEIGHT = 0.1
"""Of a new step in what is known of its bucket."""

HICCUP = 3.0
"""A step that takes so many times what is known counts as that many."""

FADE = 0.01
"""By so much the corrections of buckets that are not used come closer to that of plain steps with each of those: they were
learned with other contexts."""

HOST_SECONDS = 0.001
"""Of scheduling and packing, until a step has told."""


class StepCosts:
    """Seconds of decode steps.

    Args:
        measured: seconds of buckets without chunks, with short contexts. Without any, a token takes what a ridge's share does.

    Attributes:
        host_s: seconds that a step waits for the host, where the host had to wait for the step before.
    """

    def __init__(self, buckets: BucketTable, measured: Iterable[tuple[Bucket, float]] = ()) -> None:
        self._buckets = buckets
        self._base = dict(measured)
        self._scale: dict[Bucket, float] = {}
        self.host_s = HOST_SECONDS
        self._found: dict[tuple[int, int], Bucket] = {}

    def bucket(self, rows: int, places: int) -> Bucket:
        """What a step of so many decode rows is padded to."""
        found = self._found.get((rows, places))
        if found is None:
            found = self._found[rows, places] = self._buckets.find(rows, 0, 0, places)
        return found

    def seconds(self, rows: int, places: int) -> float:
        """Of the device, for a step of so many rows."""
        bucket = self.bucket(rows, places)
        scale = self._scale.get(bucket)
        if scale is None:
            scale = self._scale.get(self.bucket(rows, 1), 1.0)
        return self._first(bucket) * scale

    def observe(self, bucket: Bucket, seconds: float, host_s: float | None = None) -> None:
        """A step took the device so long.

        Args:
            host_s: that the device waited for the host before it; None where it did not have to.
        """
        if bucket.chunk:
            return
        scale = seconds / self._first(bucket)
        known = self._scale.get(bucket)
        self._scale[bucket] = scale if known is None else known + WEIGHT * (min(scale, HICCUP * known) - known)
        if bucket.queries == 1:
            plain = self._scale[bucket]
            for other, correction in self._scale.items():
                if other.decode == bucket.decode and other is not bucket:
                    self._scale[other] = correction + FADE * (plain - correction)
        if host_s is not None:
            self.host_s += WEIGHT * (min(host_s, HICCUP * self.host_s) - self.host_s)

    def _first(self, bucket: Bucket) -> float:
        found = self._base.get(bucket)
        if found is None:
            rows = max(bucket.tokens, self._buckets.ridge) + STEP_OVERHEAD
            found = self._base[bucket] = rows * 1e-4
        return found
