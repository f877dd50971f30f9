"""Which drafts become tokens.

Each place of a row draws the model's own token for its position, with the request's own numbers for that position, from the
distribution that the drafts before it leave: as if these were the tokens. A draft is accepted where it is the very token that
was drawn at the place before it; the first one that is not is replaced by what was drawn. So the tokens are those that the
request would have without drafts, whatever its temperature, and a seed means the same. For drafts that are not drawn at random
(looked up, or a draft model's likeliest token) that accepts as often as rejection sampling can: with a draft of probability 1, a
token x is accepted with the model's probability of x (Leviathan et al. 2023, arXiv:2211.17192).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def drafts_before(draft_S: jax.Array, place_S: jax.Array, most: int) -> jax.Array:
    """before_SK int32: of each row the drafts before it in its request's rows; -1 behind them.

    Args:
        draft_S: the draft that follows each row's place, -1 for none.
        place_S: which of its request's rows it is, from 0. Rows of a request lie one behind the other.
        most: K, drafts of a request at most.
    """
    first_S = jnp.arange(place_S.shape[0]) - place_S
    place_K = jnp.arange(most)
    rows_SK = jnp.minimum(first_S[:, None] + place_K, place_S.shape[0] - 1)
    return jnp.where(place_K < place_S[:, None], draft_S[rows_SK], -1)


def accept(token_S: jax.Array, draft_S: jax.Array, place_S: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(taken_S, last_S), bool: rows whose token is the request's, and of these the last one of each request.

    Args:
        token_S: what each row drew.
        draft_S, place_S: as in `drafts_before`.
    """
    missed_S = token_S != draft_S
    misses_S = jnp.cumsum(missed_S) - missed_S  # in the rows before
    taken_S = misses_S == misses_S[jnp.arange(place_S.shape[0]) - place_S]
    return taken_S, taken_S & missed_S
