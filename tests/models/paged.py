"""Runs a model the way the engine does, by hand: chunked prefill and decode over pages, in one small program.

Layers are in groups as an engine would put them, and pages that fall behind a group's window are taken by whoever comes next.
Request r has its state in slot 1 - r.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import Step
from ops.paged_attention import Q_BLOCK, AttentionBatch, KVGroups, allocate
from ops.paged_attention.groups import layers_per_page
from ops.recurrent import RecurrentBatch
from serving.engine.cache.kv_windows import first_page, pages_of
from serving.engine.device.stores.state_store import StateStore
from serving.engine.requests.cache_specs import recurrent_of

PAGE = 16
DECODE_ROWS, CHUNK_TOKENS, CHUNK_ROWS = 2, 32, 2


class PagedModel:
    """Up to two requests at a time over pages that are handed out backwards, so that none is where it would be dense."""

    def __init__(self, model, max_len: int = 160, mesh=None, dtype=jnp.float32):
        self.pages_a_request = -(-max_len // PAGE)
        self.groups = KVGroups.of(model.kv_specs(), layers_per_page(model.kv_specs(), max_len))
        num_pages = 1 + DECODE_ROWS * pages_of(max_len, self.groups.windows, PAGE, Q_BLOCK)
        self.free = list(range(1, num_pages))
        graphdef, self.state = nnx.split(model)
        self.kv = tuple(allocate(spec, num_pages, PAGE, dtype, mesh) for spec in self.groups.arrays)
        self.recurrent = recurrent_of(model)
        if self.recurrent is not None:
            self.kv += (StateStore(self.recurrent, DECODE_ROWS, 0, mesh).states,)

        @jax.jit
        def step(state, step, kv):
            merged = nnx.merge(graphdef, state)
            result = merged.forward(step, kv)
            return merged.logits(result.hidden_TD), result.cache

        self.step = step

    def table(self) -> np.ndarray:
        """The page tables of one new request, [G, P], without pages yet."""
        return np.zeros((len(self.groups.windows), self.pages_a_request), np.int32)

    def cover(self, tables: np.ndarray, first: int, end: int) -> None:
        """Pages for positions [first, end) that are computed next; what they do not attend to any more is given back."""
        for window, table in zip(self.groups.windows, tables, strict=True):
            behind = first_page(window, first, PAGE)
            self.free += [int(page) for page in table[:behind] if page]
            table[:behind] = 0
            for i in range(behind, -(-end // PAGE)):
                table[i] = table[i] or self.free.pop()

    def run(self, decode, chunks, asked=None) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """One step.

        Args:
            decode: (token, position, page tables, slot) of each decode row.
            chunks: (tokens, first position, page tables, slot) of each piece of a prompt, at most Q_BLOCK tokens.
            asked: of each piece, how many of its last tokens the step is asked for; all where it is None.
        Returns:
            logits [V] of each decode row, and [n, V] of each piece.
        """
        B, C, R, P, G = DECODE_ROWS, CHUNK_TOKENS, CHUNK_ROWS, self.pages_a_request, len(self.groups.windows)
        tokens, positions, index = np.zeros(B + C, np.int32), np.zeros(B + C, np.int32), np.zeros((G, B + C), np.int32)
        decode_pages, decode_len = np.zeros((G, B, P), np.int32), np.zeros(B, np.int32)
        chunk_pages = np.zeros((G, R, P), np.int32)
        start, qlen, length, last = (np.zeros(R, np.int32) for _ in range(4))
        rows = np.full(C // Q_BLOCK, R, np.int32)
        decode_slot, chunk_slot = np.full(B, DECODE_ROWS, np.int32), np.full(R, DECODE_ROWS, np.int32)
        for row, (token, position, pages, slot) in enumerate(decode):
            self.cover(pages, position, position + 1)
            tokens[row], positions[row] = token, position
            index[:, row] = pages[:, position // PAGE] * PAGE + position % PAGE
            decode_pages[:, row], decode_len[row], decode_slot[row] = pages, position + 1, slot
        for row, (piece, first, pages, slot) in enumerate(chunks):
            at = slice(B + row * Q_BLOCK, B + row * Q_BLOCK + len(piece))
            where = np.arange(first, first + len(piece))
            self.cover(pages, first, first + len(piece))
            tokens[at], positions[at] = piece, where
            index[:, at] = pages[:, where // PAGE] * PAGE + where % PAGE
            chunk_pages[:, row], rows[row], chunk_slot[row] = pages, row, slot
            start[row], qlen[row], length[row] = row * Q_BLOCK, len(piece), first + len(piece)
            last[row] = len(piece) if asked is None else asked[row]
        places = self.groups.places
        if places is None:
            index, decode_pages, chunk_pages = index[0], decode_pages[0], chunk_pages[0]
        batch = AttentionBatch(index, decode_pages, decode_len, chunk_pages, start, qlen, length, rows, places=places)
        recurrent = None
        if self.recurrent is not None:
            before = np.maximum(decode_len - 1, 0), (decode_len > 0).astype(np.int32)
            recurrent = RecurrentBatch(
                decode_slot, *before, chunk_slot, start, length - qlen, qlen, num_tokens=B + C
            )  # fmt: skip
        step = Step(tokens, positions, batch, recurrent=recurrent, last_R=last)
        logits, self.kv = self.step(self.state, step, self.kv)
        logits = np.array(logits)
        pieces = [logits[B + r * Q_BLOCK :][: len(chunk[0])] for r, chunk in enumerate(chunks)]
        return [logits[row] for row in range(len(decode))], pieces

    def generate(
        self, prompts: list[list[int]], steps: int, piece: int = 13, sampled: bool = False
    ) -> list[tuple[list[int], np.ndarray]]:
        """Greedy completions of two prompts at once: (all tokens, logits [n, V] of every position but the last token's).

        With `sampled`, steps are asked only for what tokens are drawn from, and the logits of other positions are NaN.

        The prompts run in pieces of `piece` tokens; a request decodes while the other's prompt still runs.
        """
        tokens = [list(prompt) for prompt in prompts]
        tables = [self.table() for _ in prompts]
        done = [0] * len(prompts)
        logits: list[list[np.ndarray]] = [[] for _ in prompts]
        while any(len(t) < len(p) + steps for t, p in zip(tokens, prompts, strict=True)):
            filling = [r for r in range(len(prompts)) if done[r] < len(prompts[r])]
            running = [r for r in range(len(prompts)) if r not in filling and len(tokens[r]) < len(prompts[r]) + steps]
            decode = [(tokens[r][-1], len(tokens[r]) - 1, tables[r], 1 - r) for r in running]
            chunks = [(prompts[r][done[r] : done[r] + piece], done[r], tables[r], 1 - r) for r in filling]
            ends = [done[r] + piece >= len(prompts[r]) for r in filling]
            decoded, pieces = self.run(decode, chunks, [int(end) for end in ends] if sampled else None)
            for rows, end in zip(pieces, ends, strict=True) if sampled else ():
                rows[: len(rows) - end] = np.nan
            for r, row in zip(running, decoded, strict=True):
                logits[r].append(row[None])
                tokens[r].append(int(row.argmax()))
            for r, rows in zip(filling, pieces, strict=True):
                logits[r].append(rows)
                done[r] += len(rows)
                if done[r] == len(prompts[r]):
                    tokens[r].append(int(rows[-1].argmax()))
        self.free += sorted({int(page) for table in tables for page in table.ravel() if page})
        return [(t, np.concatenate(rows)) for t, rows in zip(tokens, logits, strict=True)]
