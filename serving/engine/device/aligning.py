"""What a decoder's heads attend to of a sound, token by token: from which the times of words are found. One program beside the
engine's own: it reads the weights as they are and nothing else, so that it may run while the engine does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from serving.engine.device.components import Component
from serving.engine.device.media import VisionTower
from serving.engine.device.programs.compiling import starting


class Aligner:
    """Compiles its program.

    Args:
        decoder: has `attended` (models.families.multimodal.whisper).
        heads: (layer, head) of those that follow the sound.
        length: tokens of a window, its prompt included.
    """

    def __init__(self, decoder: Component, tower: VisionTower, heads: Sequence[tuple[int, int]], length: int) -> None:
        self._decoder, self._tower, self._length = decoder, tower, length
        shape, chosen = tower.shape, tuple((int(layer), int(head)) for layer, head in heads)
        encoder, reader = tower.component.split, decoder.split

        def attended(decoder_leaves: Any, tower_leaves: Any, frames_PX: jax.Array, tokens_S: jax.Array) -> jax.Array:
            place_P2 = jnp.zeros((len(frames_PX), 2), jnp.int32)
            row_1W = encoder.merge(tower_leaves).encode(frames_PX, place_P2, jnp.int32(len(frames_PX)))
            return reader.merge(decoder_leaves).attended(tokens_S, row_1W.astype(shape.dtype), chosen)

        frames = jax.ShapeDtypeStruct((shape.patches[-1], shape.patch_dim), jnp.float32)
        tokens = jax.ShapeDtypeStruct((length,), jnp.int32)
        with starting():
            abstract = decoder.abstract_leaves, tower.component.abstract_leaves
            self._program: Callable[..., jax.Array] = jax.jit(attended).lower(*abstract, frames, tokens).compile()

    def weights(self, frames_PX: np.ndarray, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        """float32 [A, len(tokens), T]: of each head, what each token attends to when it is read. Blocks.

        Args:
            prompt: tokens in front of those.
        """
        whole = [*prompt, *tokens][: self._length]
        padded = np.zeros(self._length, np.int32)
        padded[: len(whole)] = whole
        found = self._program(self._decoder.leaves, self._tower.component.leaves, frames_PX, padded)
        return np.asarray(found)[:, len(prompt) : len(whole)]
