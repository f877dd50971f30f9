"""What an engine counts of the pages that it gives to others and takes from them."""

from __future__ import annotations

import dataclasses

REASONS = (
    "not_allowed",  # the address is no peer's
    "not_needed",  # the request computes every position anyway, or has nothing to fetch
    "no_room",  # no free pages to receive into
    "unreachable",  # the peer cannot be reached, or was lost
    "other_model",  # the peer's pages mean something else
    "incomplete",  # the peer did not have all of it
    "not_pulled",  # what was offered did not come from device to device
    "wrong_digest",  # what came is not what was asked for
    "too_slow",  # nothing came in time
    "aborted",  # the request ended, or the weights changed
    "failed",  # anything else
)
"""Why pages did not come, or not all of them."""


@dataclasses.dataclass(frozen=True, slots=True)
class TransferStats:
    """Counters since start, and gauges.

    Attributes:
        requests_in, requests_out: transfers that were begun.
        bytes_in, bytes_out: of pages and states.
        device_bytes_in, device_bytes_out: of them, those that went from device to device.
        tokens_in: positions that need not be computed thanks to them.
        seconds_in, seconds_out: that they took together.
        fallbacks: of each of REASONS, transfers that did not happen or not wholly.
        leases, leased_pages: requests whose pages are kept for others now, and how many pages.
        leases_expired: that nobody fetched in time.
        receiving: requests that wait for pages now.
    """

    requests_in: int = 0
    requests_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    device_bytes_in: int = 0
    device_bytes_out: int = 0
    tokens_in: int = 0
    seconds_in: float = 0.0
    seconds_out: float = 0.0
    fallbacks: tuple[int, ...] = (0,) * len(REASONS)
    leases: int = 0
    leased_pages: int = 0
    leases_expired: int = 0
    receiving: int = 0

    def __add__(self, other: TransferStats) -> TransferStats:
        """Of several engines together."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "fallbacks"]
        fallbacks = tuple(map(sum, zip(self.fallbacks, other.fallbacks, strict=True)))
        return TransferStats(**{n: getattr(self, n) + getattr(other, n) for n in names}, fallbacks=fallbacks)
