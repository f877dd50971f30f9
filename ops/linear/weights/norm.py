"""The norm that a product may take along."""

from __future__ import annotations

from typing import NamedTuple

import jax

from ops.norm import rms_norm


class RmsNorm(NamedTuple):
    """Root-mean-square norm of a product's input; see `ops.norm.rms_norm`.

    Attributes:
        scale_I: float32.
        eps: added to the mean square; static.
    """

    scale_I: jax.Array
    eps: float

    def __call__(self, x_TI: jax.Array) -> jax.Array:
        """The normed x, in x's dtype."""
        return rms_norm(x_TI, self.scale_I, self.eps)
