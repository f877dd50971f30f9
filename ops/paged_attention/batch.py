"""How the tokens of one step are laid out, and what the KV cache of one layer looks like from outside.

A step's T = B Q + C tokens are B *decode rows* of Q places each (the newest tokens of one running request: one, or one and the
drafts behind it that are to be verified) followed by C *chunk tokens* (pieces of prompts of up to R requests, packed). Either
part may be empty (B == 0 or C == 0), never both. A row's tokens are in its first places, the rest is padding. Every request's
piece starts at a multiple of Q_BLOCK inside the chunk part, so a block of Q_BLOCK chunk tokens belongs to one request; the gap
behind a piece is padding.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

Q_BLOCK = 16
"""Chunk pieces start at multiples of this many tokens."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "kv_index_T", "decode_pages_BP", "decode_len_B",
        "chunk_pages_RP", "chunk_start_R", "chunk_qlen_R", "chunk_len_R", "chunk_row_N", "decode_qlen_B",
        "chunk_ahead_C", "chunk_before_R",
    ],
    meta_fields=["places"],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class AttentionBatch:
    """Where each token of a step stands and which pages hold its context. All int32.

    Padding: a padded decode row has decode_len 0 (and decode_qlen 0); a padded chunk row has chunk_qlen 0; a padded token has
    kv_index 0 (page 0 is the null page: it may be written by anyone and is read by none) and arbitrary output.
    Page tables are padded with 0.

    A model whose layers are in several groups (`groups.KVGroups`) is given the tables of all, with an axis for groups in front
    of what depends on pages: kv_index_GT, decode_pages_GBP and chunk_pages_GRP. `by_group` takes it apart; a layer's batch is
    its group's.
    """

    kv_index_T: jax.Array  # where its K and V go: page * page_size + offset
    decode_pages_BP: jax.Array  # page table of each decode row
    decode_len_B: jax.Array  # context length of each decode row, this step's tokens included
    chunk_pages_RP: jax.Array  # page table of each chunk request
    chunk_start_R: jax.Array  # where its piece starts, counted inside the chunk part; a multiple of Q_BLOCK
    chunk_qlen_R: jax.Array  # tokens in its piece
    chunk_len_R: jax.Array  # its context length after this step; token j of the piece is at chunk_len - qlen + j
    chunk_row_N: jax.Array  # [C / Q_BLOCK] which row a block of chunk tokens belongs to; R for padding blocks
    decode_qlen_B: jax.Array | None = (
        None  # tokens of each decode row, the last one at decode_len - 1; None where Q is 1
    )
    chunk_ahead_C: jax.Array | None = (
        None  # how many positions behind its own each chunk token attends to; None for none
    )
    chunk_before_R: jax.Array | None = (
        None  # tokens of each piece in front of these, which are written and attend to nothing; None for none
    )
    places: tuple[tuple[int, int, int], ...] | None = None  # static: KVGroups.places

    @property
    def num_decode(self) -> int:
        """B, static."""
        return self.decode_len_B.shape[0]

    @property
    def queries(self) -> int:
        """Q, static: places of a decode row."""
        return 1 if self.decode_qlen_B is None else (self.num_tokens - self.num_chunk) // self.num_decode

    @property
    def num_decode_tokens(self) -> int:
        """B Q, static: where the chunk part begins."""
        return self.num_tokens - self.num_chunk

    @property
    def num_chunk(self) -> int:
        """C, static."""
        return self.chunk_row_N.shape[0] * Q_BLOCK

    @property
    def num_tokens(self) -> int:
        """T, static."""
        return self.kv_index_T.shape[-1]

    @property
    def row_queries(self) -> jax.Array:
        """int32 [B], tokens of each decode row, whatever Q is; 0 for padding."""
        return (self.decode_len_B > 0).astype(jnp.int32) if self.decode_qlen_B is None else self.decode_qlen_B

    def row_positions(self) -> jax.Array:
        """int32 [B, Q], the position of each place of the decode rows; -1 for padding."""
        place_Q = jnp.arange(self.queries, dtype=jnp.int32)
        qlen_B1 = self.row_queries[:, None]
        return jnp.where(place_Q < qlen_B1, self.decode_len_B[:, None] - qlen_B1 + place_Q, -1)

    def real(self) -> jax.Array | None:
        """bool [T], which tokens are no padding; None where no layer keeps pages, by which they are known."""
        index_T = self.kv_index_T
        if index_T.ndim > 1:
            index_T = index_T[0] if index_T.shape[0] else None
        return None if index_T is None else index_T > 0

    def last(self, last_R: jax.Array) -> tuple[AttentionBatch, jax.Array]:
        """(the batch in which of each piece only the last blocks of Q_BLOCK attend that hold its last tokens; bool [T], which
        tokens are decode rows' or those last ones). K and V of all are written.

        Args:
            last_R: int32, how many of each piece's tokens are asked for.
        """
        R, first = self.chunk_qlen_R.shape[0], self.num_decode_tokens
        start_R, skipped_R = self.chunk_start_R, self.chunk_qlen_R - last_R
        blocks_R = jnp.where(last_R > 0, skipped_R // Q_BLOCK * Q_BLOCK, self.chunk_qlen_R)
        row_N, at_C = jnp.minimum(self.chunk_row_N, R - 1), jnp.arange(self.num_chunk, dtype=jnp.int32)
        behind_N = (self.chunk_row_N < R) & (at_C[::Q_BLOCK] >= (start_R + blocks_R)[row_N]) & (last_R > 0)[row_N]
        piece_C = at_C - jnp.repeat(start_R[row_N], Q_BLOCK)
        row_C = jnp.repeat(row_N, Q_BLOCK)
        asked_C = jnp.repeat(behind_N, Q_BLOCK) & (piece_C >= skipped_R[row_C]) & (piece_C < self.chunk_qlen_R[row_C])
        batch = dataclasses.replace(
            self,
            chunk_start_R=start_R + blocks_R,
            chunk_qlen_R=self.chunk_qlen_R - blocks_R,
            chunk_row_N=jnp.where(behind_N, self.chunk_row_N, R),
            chunk_before_R=blocks_R,
        )
        return batch, jnp.concatenate([jnp.ones(first, bool), asked_C])

    def by_group(self) -> tuple[AttentionBatch, ...]:
        """The batch of each group of layers; the only one as it is, and one without pages where no layer keeps any."""
        if not self.places:
            return (self,)
        return tuple(
            dataclasses.replace(
                self,
                kv_index_T=self.kv_index_T[group],
                decode_pages_BP=self.decode_pages_BP[group],
                chunk_pages_RP=self.chunk_pages_RP[group],
                places=None,
            )
            for group in range(self.kv_index_T.shape[0])
        )

    def place(self, layer: int) -> tuple[int, int, int]:
        """(group, array of pages, part of its pages) of a layer."""
        return (0, layer, 0) if self.places is None else self.places[layer]


@dataclasses.dataclass(frozen=True)
class KVSpec:
    """What one layer keeps for each position. Hashable and static.

    Attributes:
        num_kv_heads, head_dim: K heads and their size.
        v_head_dim: size of V heads; 0 when the layer stores one latent for both (MLA).
        window: how many positions back it attends at most, itself included; None for all.
        indexed: K is one latent for both, and in V's place stand the keys by which positions are chosen (see indexed.py).
        kinds: of an array whose pages hold one layer of this kind or several that keep less, all that may lie there, this one
            included (see shared.py); () where all are alike.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    indexed: bool = False
    kinds: tuple[KVSpec, ...] = ()

    @property
    def numbers(self) -> int:
        """Of a position, K and V together."""
        return self.num_kv_heads * (self.head_dim + self.v_head_dim)

    def kind_of(self, layer: KVSpec) -> KVSpec:
        """What a layer keeps, as it lies in this array: as it is, or, where no number of such layers fills a page, with heads as
        large as the array's."""
        fits = self.numbers % layer.numbers == 0
        return dataclasses.replace(layer if fits else self, window=None, kinds=())

    def parts_of(self, layer: KVSpec) -> int:
        """How many such layers a page of this array holds."""
        return self.numbers // self.kind_of(layer).numbers
