"""Texts that wait for an encoder, and which of them go into the next batch. Plain Python, no threads."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Container, Iterable
from typing import Any

from serving.engine.encoder.runner import EncoderBuckets, Text


@dataclasses.dataclass(order=True)
class Job:
    """One text of a request, in the order of its turn.

    Attributes:
        priority, turn: lower first; `turn` counts up with arrival.
        request: whose it is.
        index: which of the request's texts.
        length: of the rows of its bucket.
    """

    priority: int
    turn: int
    text: Text = dataclasses.field(compare=False)
    request: Any = dataclasses.field(compare=False)
    index: int = dataclasses.field(compare=False)
    length: int = dataclasses.field(compare=False)


class EncoderQueue:
    """Waiting texts.

    The one whose turn it is decides a batch's length. Texts of the same bucket go with it, then, into rows that would be
    padding, shorter ones: so nobody waits for company, and a long row is not spent on a short text while a long one waits.
    """

    def __init__(self, buckets: EncoderBuckets) -> None:
        self._buckets = buckets
        self._heap: list[Job] = []
        self._turns = itertools.count()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, text: Text, request: Any, index: int, priority: int) -> None:
        length = self._buckets.length_for(len(text.token_ids))
        heapq.heappush(self._heap, Job(priority, next(self._turns), text, request, index, length))
        self.num_tokens += len(text.token_ids)

    def put_back(self, jobs: Iterable[Job]) -> None:
        """Has jobs wait again, at their old turns."""
        self._keep([*self._heap, *jobs])

    @property
    def turns(self) -> set[int]:
        """Of what waits."""
        return {job.turn for job in self._heap}

    def remove(self, request: Any) -> None:
        """Takes a request's waiting texts out."""
        self._keep([job for job in self._heap if job.request != request])

    def take(self, only: Container[int] | None = None) -> list[Job]:
        """The next batch, in order of turn; empty when nothing waits.

        Args:
            only: turns of the jobs that may go; None for all.
        """
        turns = sorted(job for job in self._heap if only is None or job.turn in only)
        if not turns:
            return []
        length = turns[0].length
        most = self._buckets.most_rows(length)
        same = [job for job in turns if job.length == length][:most]
        spare = self._buckets.find(length, len(same)).rows - len(same)
        shorter = (job for job in turns if job.length < length)
        batch = [*same, *itertools.islice(shorter, spare)]
        taken = {job.turn for job in batch}
        self._keep([job for job in self._heap if job.turn not in taken])
        return sorted(batch)

    def _keep(self, jobs: list[Job]) -> None:
        self._heap = jobs
        heapq.heapify(self._heap)
        self.num_tokens = sum(len(job.text.token_ids) for job in jobs)
