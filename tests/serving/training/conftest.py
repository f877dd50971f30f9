"""Programs of these tests are compiled quickly: each runs a few times, on a few numbers."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
