"""What reads images beside the decoder: its weights, the programs that encode, and the store of embeddings that steps read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from serving.engine.device.components import Component
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import VISION, ProgramKey
from serving.engine.device.programs.packing import MediaShape, pack_image
from serving.engine.device.programs.placement import BY_REPLICA, EVERYWHERE, num_replicas, place
from serving.engine.device.programs.steps import SplitModel
from serving.engine.device.stores.at_rest import delete
from serving.engine.requests.commands import Encode
from serving.engine.requests.moves import Encoding

LEAST_PATCHES = 64
LEAST_FRAMES = 256
"""2.56 s."""
FINER = (256, 2048)
"""Where most photographs are: patches between which programs are this much larger than each other. Every one is compiled, and run
once at start."""


def tile_sizes(most: int, tile: int) -> tuple[int, ...]:
    """P of the programs that encode images in tiles of so many patches: 1, 2, 4, ... of them, up to the largest image's."""
    counts = [1]
    while counts[-1] * tile < most:
        counts.append(min(2 * counts[-1], -(-most // tile)))
    return tuple(count * tile for count in counts)


def patch_sizes(most: int, merge: int) -> tuple[int, ...]:
    """P of the programs that encode, up to the largest image's: doubling, and within `FINER` in steps of its beginning. What is
    padded is computed like the rest."""
    square, size = merge**2, LEAST_PATCHES * merge**2 // 4 if merge > 1 else LEAST_PATCHES
    sizes = [size]
    while sizes[-1] < most:
        sizes.append(sizes[-1] + (FINER[0] if FINER[0] <= sizes[-1] < FINER[1] else sizes[-1]))
    return tuple(-(-size // square) * square for size in sizes)


def frame_sizes(most: int, window: int, per: int) -> tuple[int, ...]:
    """P of the programs that hear: doubling, in wholes of `per` frames, up to so many, but not beyond a window's."""
    sizes = [LEAST_FRAMES]
    while sizes[-1] < most + LEAST_FRAMES:  # what stands behind the sound's end is heard along
        sizes.append(2 * sizes[-1])
    return tuple(sorted({min(-(-size // per) * per, window) for size in sizes}))


class VisionTower:
    """A tower on the decoder's mesh.

    Args:
        model: an nnx.Module implementing models.api.ImageEncoder, weights on their devices.

    Attributes:
        component: its weights.
        store_MD: embeddings of images, of all replicas end to end; taken over by each of its programs.
        clock: how long they took.
    """

    def __init__(self, model: Any, shape: MediaShape, mesh: Mesh | None) -> None:
        self.component = Component(VISION, model)
        self.shape = shape
        self.store_MD: Any = None
        self.clock = EncoderClock()
        self._mesh, self._replicas = mesh, num_replicas(mesh)
        self._programs: dict[ProgramKey, Any] = {}

    def reset(self) -> None:
        """An empty store."""
        rows = jnp.zeros((self._replicas * self.shape.rows, self.shape.width), self.shape.dtype)
        self.store_MD = place(self._mesh, rows, BY_REPLICA if self._replicas > 1 else EVERYWHERE)

    def programs(self) -> list[Program]:
        """One for each number of patches, for one replica."""
        found = []
        for sound, shape in self._shapes():
            for patches in shape.patches:
                flat = jax.ShapeDtypeStruct((shape.layout(patches).size,), jnp.int32)
                pixels = jax.ShapeDtypeStruct((patches, shape.patch_dim), jnp.float32)
                args = (self.component.abstract_leaves, shape.store, pixels, flat)
                fn = make_encode(self.component.split, shape, patches, sound)
                found.append(Program(_key(patches, sound), fn, args, (1,), (0,), True))
        return found

    def _shapes(self) -> tuple[tuple[bool, MediaShape], ...]:
        """Whether it is sounds, and how they are read."""
        ears = self.shape.ears
        return ((False, self.shape), *(() if ears is None else ((True, ears),)))

    def bind(self, programs: dict[ProgramKey, Any]) -> None:
        """Takes the compiled programs."""
        self._programs = programs

    def commands(self, encodings: Sequence[Encoding]) -> list[Encode]:
        """What encodes images and sounds: one of each replica at a time."""
        found: list[Encode] = []
        for sound, shape in self._shapes():
            own = [e for e in encodings if sound == (e.item.sound and self.shape.ears is not None)]
            waiting = [[e for e in own if e.replica == replica] for replica in range(self._replicas)]
            for turn in range(max(map(len, waiting))):
                now = [images[turn] if turn < len(images) else None for images in waiting]
                patches = shape.bucket(max(len(one.item.patches_PX) for one in now if one is not None))
                packed = [pack_image(one, patches, shape) for one in now]
                pixels, flat = (np.concatenate(parts) for parts in zip(*packed, strict=True))
                found.append(Encode(patches, pixels, flat, sound))
        return found

    def empty(self) -> Iterator[Encode]:
        """Commands that encode nothing, one for each program."""
        for sound, shape in self._shapes():
            for patches in shape.patches:
                pixels, flat = pack_image(None, patches, shape)
                yield Encode(patches, np.tile(pixels, (self._replicas, 1)), np.tile(flat, self._replicas), sound)

    def encode(self, command: Encode) -> None:
        """Puts images' embeddings into the store, for all steps that follow."""
        program, began = self._programs[_key(command.bucket, command.sound)], time.perf_counter()
        self.store_MD, done = program(self.component.leaves, self.store_MD, command.patches, command.packed)
        layout, parts = self.shape.of(command.sound).layout(command.bucket), command.packed.reshape(self._replicas, -1)
        if any(layout.views(flat)["count"][0] for flat in parts):
            self.clock.watch(began, done)

    def sleep(self) -> int:
        """Gives its memory back; the weights are kept in host memory. Returns the bytes of the store."""
        freed = self.store_MD.nbytes
        self.component.sleep(True)
        delete(self.store_MD)
        self.store_MD = None
        return freed


class EncoderClock:
    """Measures programs that nobody waits for, in a thread of its own.

    Attributes:
        seconds: that they took: from being started, or from the end of the one before, to their end. What else the devices did
            in front of them is in it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._ended = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-encoder-clock")

    def watch(self, began: float, done: jax.Array) -> None:
        """Of one program.

        Args:
            began: when it was started, by `time.perf_counter`.
            done: a result of it that no other program takes over.
        """
        self._thread.submit(self._wait, began, done)

    def _wait(self, began: float, done: jax.Array) -> None:
        jax.block_until_ready(done)
        began, self._ended = max(began, self._ended), time.perf_counter()
        self.seconds += self._ended - began


def make_encode(
    tower: SplitModel, shape: MediaShape, patches: int, sound: bool = False
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """encode(leaves, store_MD, patches_PX, flat) -> (store_MD with the image's embeddings in their rows, [1] of them).

    Args:
        sound: of a tower that also sees, its ears' (`models.encoders.senses`).
    """
    layout = shape.layout(patches)

    def encode(
        leaves: tuple[jax.Array, ...], store_MD: jax.Array, patches_PX: jax.Array, flat: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        f = layout.unpack(flat)
        model = tower.merge(leaves)
        rows_NM = (model.hear if sound else model.encode)(patches_PX, f["place_P2"], f["count"][0])
        if "pick_NK" in f:
            rows_NM = jnp.einsum("nkm,nk->nm", rows_NM[f["pick_NK"]], f["share_NK"].astype(rows_NM.dtype))
        return store_MD.at[f["rows_N"]].set(rows_NM.astype(store_MD.dtype), mode="drop"), rows_NM[0, :1]

    return encode


def _key(patches: int, sound: bool) -> ProgramKey:
    return ProgramKey("encode", patches, "of sound" if sound else "", VISION)
