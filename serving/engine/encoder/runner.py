"""Runs an encoder: batches of whole texts, padded to compiled shapes. No pages, no state between batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.embedding_head import EmbeddingHead
from models.pooling import pool
from serving.engine.device.programs.compiling import CompileGuard, Program, ProgramCache, compile_all
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.placement import placed
from serving.engine.device.programs.steps import SplitModel
from serving.engine.device.stores.at_rest import Rested, check_fit, delete, to_devices, to_host

POOLINGS = ("mean", "cls", "last")
"""What a request may ask for; a model's own may be another."""
MIN_LENGTH = 16


@dataclasses.dataclass(frozen=True)
class Text:
    """One row of a batch.

    Attributes:
        token_ids: 1 to max_model_len ids.
        segment_ids: as long, or empty: all of the first text.
        pooling: one of the runner's `poolings`; None for the model's own; of no effect where labels are told.
    """

    token_ids: Sequence[int]
    segment_ids: Sequence[int] = ()
    pooling: str | None = None


@dataclasses.dataclass(frozen=True, order=True)
class EncoderBucket:
    """One program: `rows` texts of up to `length` tokens."""

    length: int
    rows: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"


@dataclasses.dataclass(frozen=True)
class EncoderBuckets:
    """Every shape of a server: lengths double (a text wastes less than half its row), rows quadruple up to a token budget."""

    buckets: tuple[EncoderBucket, ...]

    @classmethod
    def make(cls, max_model_len: int, max_rows: int, max_tokens: int) -> EncoderBuckets:
        """
        Args:
            max_tokens: of a batch, padding included; a single text may have more.
        """
        found = []
        length = MIN_LENGTH
        while True:
            length = min(length, max_model_len)
            most = max(1, min(max_rows, max_tokens // length))
            rows = 1
            while rows < most:
                found.append(EncoderBucket(length, rows))
                rows *= 4
            found.append(EncoderBucket(length, most))
            if length == max_model_len:
                return cls(tuple(sorted(found)))
            length *= 2

    def length_for(self, tokens: int) -> int:
        """The length of the rows that hold a text."""
        return next(b.length for b in self.buckets if b.length >= tokens)

    def most_rows(self, length: int) -> int:
        """How many texts of a length fit a batch."""
        return max(b.rows for b in self.buckets if b.length == length)

    def find(self, length: int, rows: int) -> EncoderBucket:
        """The smallest bucket of a length that holds so many texts."""
        return next(b for b in self.buckets if b.length == length and b.rows >= rows)


class EncoderRunner:
    """One encoder on its devices.

    Args:
        model: a `models.api.Encoder`; a `Classifier` where `classifies`.
        classifies: texts, and pairs that are read as one, get labels; else they become vectors.
        head: how those are made.
    """

    def __init__(
        self,
        model: Any,
        buckets: EncoderBuckets,
        cache: ProgramCache,
        *,
        classifies: bool,
        head: EmbeddingHead | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self._head = head or EmbeddingHead()
        # Vectors of several poolings are wider than those of one, so no request can choose between them.
        alone = len(self._head.modes) == 1
        self.poolings = tuple(dict.fromkeys((*POOLINGS, *self._head.modes))) if alone else (self._head.pooling,)
        self.buckets = buckets
        self.guard = CompileGuard()
        self._classifies = classifies
        self._cache = cache
        self._mesh = mesh
        self._split, self._leaves = SplitModel.split(model)
        self._programs: dict[ProgramKey, Any] = {}
        self._asleep: Rested = []

    def compile(self, on_done: Callable[[int, int], None] | None = None) -> None:
        """Compiles every program, runs each once, and arms the guard."""
        leaves = jax.tree.map(_abstract, self._leaves)
        programs = []
        for b in sorted(self.buckets.buckets, key=lambda b: -b.length * b.rows):
            packed = jax.ShapeDtypeStruct((b.rows, 2 * b.length + 2), jnp.int32)
            programs.append(placed(self._mesh, Program(ProgramKey("encode", b), self._encode, (leaves, packed))))
        self._programs = compile_all(programs, self._cache, on_done)
        for b in self.buckets.buckets:
            jax.block_until_ready(self._dispatch([Text((0,))], b))
        self.guard.arm()

    def run(self, texts: Sequence[Text]) -> np.ndarray:
        """Vectors [texts, embed] of length 1, or logits [texts, labels]; float32. Waits for the device.

        Args:
            texts: at most `buckets.most_rows` of the longest one's length.
        """
        length = self.buckets.length_for(max(len(text.token_ids) for text in texts))
        found = np.asarray(self._dispatch(texts, self.buckets.find(length, len(texts))))[: len(texts)]
        return found if self._classifies else self._head.finish(found)

    def _dispatch(self, texts: Sequence[Text], bucket: EncoderBucket) -> Any:
        """Starts a batch. Its input is one array: a transfer costs more than its bytes."""
        S = bucket.length
        packed = np.zeros((bucket.rows, 2 * S + 2), np.int32)
        for row, text in zip(packed, texts, strict=False):
            row[: len(text.token_ids)] = text.token_ids
            row[S : S + len(text.segment_ids)] = text.segment_ids
            pooling = self.poolings.index(text.pooling or self._head.pooling)
            row[2 * S :] = len(text.token_ids), pooling
        return self._programs[ProgramKey("encode", bucket)](self._leaves, packed)

    def _encode(self, leaves: tuple[jax.Array, ...], packed: jax.Array) -> jax.Array:
        model = self._split.merge(leaves)
        S = (packed.shape[1] - 2) // 2
        length_B, pooling_B = packed[:, -2], packed[:, -1]
        hidden_BSD = model.encode(packed[:, :S], length_B, packed[:, S : 2 * S])
        if self._classifies:
            return model.classify(hidden_BSD, length_B)
        if len(self._head.modes) > 1:
            return jnp.concatenate(
                [pool(hidden_BSD, length_B, mode, normalize=False) for mode in self._head.modes], axis=-1
            )
        pooled = jnp.stack([pool(hidden_BSD, length_B, mode, normalize=False) for mode in self.poolings])
        return jnp.take_along_axis(pooled, pooling_B[None, :, None], axis=0)[0]

    def leaves_of(self, model: Any) -> tuple[Any, ...]:
        """The weights of another checkpoint, checked to fit this model's programs.

        Raises:
            ValueError: another structure, shape, dtype or placement, in a sentence.
        """
        _, leaves = SplitModel.split(model)
        check_fit(leaves, self._leaves)
        return leaves

    def check_head(self, head: EmbeddingHead) -> None:
        """Holds how another checkpoint makes vectors against what the programs pool.

        Raises:
            ValueError: they do not pool so.
        """
        if not self._classifies and head.pooling not in self.poolings:
            raise ValueError(
                f"the checkpoint's pooling is {head.pooling!r}; the served model's programs have {', '.join(self.poolings)}."
            )

    def replace_weights(self, leaves: tuple[Any, ...], head: EmbeddingHead | None = None) -> None:
        """Uses other weights from the next batch on, and `head` where it is given; see `leaves_of` and `check_head`."""
        self._leaves, self._head = leaves, head or self._head

    @property
    def device_bytes(self) -> int:
        """What the weights take of the devices; asked while awake."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._leaves))

    @property
    def weight_bytes(self) -> int:
        return self.device_bytes

    def sleep(self, keep_weights: bool) -> int:
        """Gives the memory of the weights back, which are kept in host memory or lost. Returns bytes freed."""
        freed = self.device_bytes
        self._asleep = to_host(self._leaves) if keep_weights else []
        delete(self._leaves)
        return freed

    def wake(self, leaves: tuple[Any, ...] | None = None) -> None:
        """Takes memory again; `leaves` are the weights, where `sleep` did not keep them."""
        self._leaves = to_devices(self._asleep) if leaves is None else leaves
        self._asleep = []

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self._leaves))


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
