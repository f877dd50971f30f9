"""How long a step takes: a linear model with non-negative weights, fitted to recorded steps of a real run.

    seconds = factor[bucket] * weights . features(bucket, context)

The weights say what a row, a chunk token and an attended position cost; the factor of a bucket, the mean ratio of its
recorded steps to that line, takes in what is not linear (a matmul of 1 row against one of 64).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from serving.engine.requests.buckets import CPU_RIDGE, VERIFIED_RIDGES, Bucket, BucketTable
from serving.engine.requests.plan import StepPlan

FEATURES = (
    "step",
    "decode_step",
    "chunk_step",
    "decode_rows",
    "chunk_tokens",
    "sampled_rows",
    "given_tokens",
    "context",
    "chunk_work",
)
"""`given_tokens` are a step's own, the others those that it is padded to: kernels that leave padding out pay for the former."""

MIN_RECORDS_PER_FACTOR = 5
HICCUP = 2.0
"""A step that takes so many times as long as most of its bucket was held up by something else."""


@dataclasses.dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's time depends on, before padding.

    Attributes:
        decode: decode rows.
        chunk: chunk tokens, alignment included.
        rows: prompts with a piece in the step.
        context: positions the decode rows attend to, summed.
        chunk_work: query-key pairs of the chunks: sum of length * (start + length / 2).
        places: of the longest decode row: its token and its drafts.
    """

    decode: int
    chunk: int
    rows: int
    context: int
    chunk_work: float
    places: int = 1

    @staticmethod
    def of(plan: StepPlan, replicas: int = 1) -> StepShape:
        """Of several replicas the largest of each: all are padded alike, and wait for the slowest."""
        if replicas > 1:
            shapes = [dataclasses.astuple(StepShape.of(plan.of_replica(replica))) for replica in range(replicas)]
            return StepShape(*map(max, zip(*shapes, strict=True)))
        chunks = plan.chunks
        return StepShape(
            decode=len(plan.decode),
            chunk=plan.chunk_tokens,
            rows=len(chunks),
            context=sum(plan.decode_positions) + len(plan.decode),
            chunk_work=sum(c.length * (c.start + c.length / 2) for c in chunks),
            places=plan.queries,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """A measured step: its shape and how long the device had it, in seconds."""

    shape: StepShape
    seconds: float


def write_records(path: str | pathlib.Path, records: Iterable[StepRecord]) -> None:
    """One JSON object a step."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            row = dataclasses.asdict(record.shape) | {"seconds": round(record.seconds, 7)}
            file.write(json.dumps(row) + "\n")


def read_records(path: str | pathlib.Path) -> Iterator[StepRecord]:
    """Raises ValueError naming the line that is not a record."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                seconds = float(row.pop("seconds"))
                yield StepRecord(StepShape(**row), seconds)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number} is not a recorded step: {error}") from error


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Predicts a step's seconds.

    Attributes:
        weights: seconds a unit of each of FEATURES.
        max_num_seqs, max_num_batched_tokens: what the bucket table was made from; steps are padded as the runner pads.
        factors: (decode, chunk) of a bucket -> correction; 1 where not listed.
        draft_tokens: drafts that a request has in a step at most.
        host_s: seconds of host work a step.
        delivery_s: seconds from a step's end to its tokens being seen by whoever asked.
    """

    weights: tuple[float, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    factors: tuple[tuple[tuple[int, int], float], ...] = ()
    host_s: float = 0.0
    delivery_s: float = 0.0
    draft_tokens: int = 0

    @functools.cached_property
    def _buckets(self) -> BucketTable:
        places = VERIFIED_RIDGES * CPU_RIDGE
        return BucketTable.make(
            self.max_num_seqs, self.max_num_batched_tokens, draft_tokens=self.draft_tokens, draft_places=places
        )

    @functools.cached_property
    def _found(self) -> dict[tuple[int, int, int, int], tuple[Bucket, float, float]]:
        return {}  # (decode, chunk, rows, places) -> bucket, its constant part in seconds, its factor

    def price(self, shape: StepShape) -> tuple[Bucket, float]:
        """What a step is padded to, and the seconds that it takes. Raises ValueError when it is larger than any bucket."""
        bucket, constant, factor = self._lookup(shape)
        return bucket, factor * (constant + self.weights[-2] * shape.context + self.weights[-1] * shape.chunk_work)

    def growth(self, shape: StepShape) -> float:
        """How many seconds longer than this step of decode rows alone the next one takes, in the same bucket: each row has one
        position more to attend to."""
        return self._lookup(shape)[2] * self.weights[-2] * shape.decode

    def seconds(self, shape: StepShape) -> float:
        return self.price(shape)[1]

    def errors(self, records: Iterable[StepRecord]) -> np.ndarray:
        """Relative error of each prediction."""
        return np.array([self.seconds(r.shape) / r.seconds - 1 for r in records])

    def _lookup(self, shape: StepShape) -> tuple[Bucket, float, float]:
        key = (shape.decode, shape.chunk, shape.rows, shape.places)
        found = self._found.get(key)
        if found is None:
            bucket = self._buckets.find(*key)
            constant = float(np.dot(self.weights[:-2], features(bucket, shape)[:-2]))
            like = bucket
            if bucket.queries > 1:  # a place costs what a row does
                like = self._buckets.find(min(bucket.decode_tokens, self.max_num_seqs), 0, 0)
            found = self._found[key] = (bucket, constant, dict(self.factors).get((like.decode, like.chunk), 1.0))
        return found

    def decode_steps(self) -> tuple[tuple[Bucket, float], ...]:
        """What steps without chunks take, by bucket: what an engine with drafts measures when it starts."""
        return tuple(
            (bucket, self.seconds(StepShape(bucket.decode, 0, 0, 0, 0.0, bucket.queries)))
            for bucket in self._buckets.buckets
            if not bucket.chunk
        )

    @property
    def buckets(self) -> BucketTable:
        """What steps are padded to."""
        return self._buckets

    def save(self, path: str | pathlib.Path) -> None:
        row = dataclasses.asdict(self) | {"weights": dict(zip(FEATURES, self.weights, strict=True))}
        pathlib.Path(path).write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | pathlib.Path) -> CostModel:
        """Raises ValueError when the file is not a cost model."""
        try:
            row = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
            by_name = row.pop("weights")
            weights = tuple(float(by_name[name]) for name in FEATURES)
            factors = tuple(((int(d), int(c)), float(f)) for (d, c), f in row.pop("factors"))
            return CostModel(weights, factors=factors, **row)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a cost model as scripts/simulate.py fits it: {error}") from error


def features(bucket: Bucket, shape: StepShape) -> tuple[float, ...]:
    """In the order of FEATURES."""
    return (
        1.0,
        float(bucket.decode > 0),
        float(bucket.chunk > 0),
        bucket.decode_tokens,
        bucket.chunk,
        bucket.samples,
        shape.decode * shape.places + shape.chunk,
        shape.context,
        shape.chunk_work,
    )


def fit(
    records: Iterable[StepRecord],
    max_num_seqs: int,
    max_num_batched_tokens: int,
    *,
    host_s: float = 0.0,
    delivery_s: float = 0.0,
) -> CostModel:
    """Non-negative least squares on the relative error, re-weighted (Huber) so that hiccups of the machine do not bend it.

    Raises:
        ValueError: too few records.
    """
    records = [r for r in records if r.seconds > 0]
    if len(records) < len(FEATURES):
        raise ValueError(f"{len(records)} recorded steps are too few to fit {len(FEATURES)} weights.")
    table = BucketTable.make(max_num_seqs, max_num_batched_tokens)
    buckets = [table.find(r.shape.decode, r.shape.chunk, r.shape.rows) for r in records]
    y = np.array([r.seconds for r in records])
    x = np.array([features(b, r.shape) for b, r in zip(buckets, records, strict=True)], np.float64) / y[:, None]
    scale = np.maximum(np.abs(x).max(axis=0), 1e-300)
    x /= scale
    keep = np.ones_like(y)
    weights = np.zeros(x.shape[1])
    for _ in range(8):
        weights = _nnls(x * keep[:, None], keep)
        residual = np.abs(x @ weights - 1)
        limit = max(1.5 * float(np.median(residual)), 1e-6)
        keep = np.sqrt(np.minimum(1.0, limit / np.maximum(residual, 1e-12)))
    ratios: dict[tuple[int, int], list[float]] = defaultdict(list)
    for bucket, predicted in zip(buckets, x @ weights, strict=True):
        ratios[bucket.decode, bucket.chunk].append(1 / max(predicted, 1e-9))
    factors = tuple(
        (key, _usual(found)) for key, found in sorted(ratios.items()) if len(found) >= MIN_RECORDS_PER_FACTOR
    )
    fitted = tuple((weights / scale).tolist())
    return CostModel(fitted, max_num_seqs, max_num_batched_tokens, factors, host_s, delivery_s)


def _usual(ratios: Sequence[float]) -> float:
    """The mean without hiccups: whoever waits for many steps waits for their sum, which their median falls short of."""
    limit = HICCUP * float(np.median(ratios))
    return float(np.mean([one for one in ratios if one <= limit]))


def _nnls(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min |a x - b| over x >= 0, by the active-set method of Lawson and Hanson (1974)."""
    ata, atb = a.T @ a, a.T @ b
    n = a.shape[1]
    x = np.zeros(n)
    active = np.zeros(n, bool)
    tolerance = 1e-10 * max(float(np.abs(atb).max()), 1e-30)
    for _ in range(3 * n):
        gradient = np.where(active, -np.inf, atb - ata @ x)
        entering = int(gradient.argmax())
        if gradient[entering] <= tolerance:
            break
        active[entering] = True
        while active.any():
            rows = np.flatnonzero(active)
            trial = np.zeros(n)
            trial[rows] = np.linalg.lstsq(ata[np.ix_(rows, rows)], atb[rows], rcond=None)[0]
            if (trial[rows] > 0).all():
                x = trial
                break
            falling = rows[trial[rows] <= 0]
            step = np.min(x[falling] / np.maximum(x[falling] - trial[falling], 1e-300))
            x = np.maximum(x + step * (trial - x), 0)
            active &= x > 1e-14
    return x
