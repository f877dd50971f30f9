"""A tower with eyes and ears: images and sounds by programs of their own, into one store."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.encoders.senses import Senses
from models.layers import Build, Linear
from serving.engine.api.media import MediaItem
from serving.engine.device.media import VisionTower
from serving.engine.device.programs.packing import MediaShape
from serving.engine.requests.moves import Encoding


class Sums(nnx.Module):
    """Makes one embedding of `per` patches: their sums, times a weight."""

    def __init__(self, width: int, per: int):
        self.config, self.per = types.SimpleNamespace(), per
        self.weight = Linear(width, 3, Build(dtype=jnp.float32, compute_dtype=jnp.float32), (None, None))
        self.weight.weight.set_value(jnp.arange(3 * width, dtype=jnp.float32).reshape(3, width))

    def encode(self, patches_PX, place_P2, count):
        real = jnp.arange(len(patches_PX)) < count
        x = jnp.where(real[:, None], patches_PX, 0)
        return self.weight(x.reshape(-1, self.per, x.shape[1]).sum(1))


def item(width: int, patches: int, per: int, sound: bool) -> tuple[MediaItem, np.ndarray]:
    pixels = np.random.default_rng(patches).normal(size=(patches, width)).astype(np.float32)
    count = -(-patches // per)
    wanted = np.pad(pixels, ((0, count * per - patches), (0, 0))).reshape(count, per, width).sum(1)
    made = MediaItem(b"", np.arange(count, dtype=np.int32), pixels, np.zeros((patches, 2), np.int32), sound=sound)
    return made, wanted @ np.arange(3 * width).reshape(3, width).T


def test_images_and_sounds_by_their_own_programs_into_one_store():
    eyes = MediaShape(rows=20, width=3, dtype="float32", axes=False, patches=(4, 8), patch_dim=5, merge=2)
    ears = dataclasses.replace(eyes, patches=(6, 12), patch_dim=2, merge=1, per=3)
    shape = dataclasses.replace(eyes, ears=ears)
    assert shape.most_patches == 12 and shape.of(sound=True) is ears and ears.of(sound=True) is ears
    tower = VisionTower(Senses(Sums(5, 4), Sums(2, 3)), shape, None)
    tower.reset()
    programs = tower.programs()
    assert sorted(str(program.key) for program in programs) == [
        "vision: encode 12 of sound", "vision: encode 4", "vision: encode 6 of sound", "vision: encode 8",
    ]  # fmt: skip
    tower.bind({program.key: jax.jit(program.fn) for program in programs})
    things = [item(5, 8, 4, False), item(2, 7, 3, True), item(5, 4, 4, False)]
    rows = [np.array([0, 1], np.int32), np.array([5, 3, 7], np.int32), np.array([9], np.int32)]
    commands = tower.commands([Encoding(0, one, at) for (one, _), at in zip(things, rows, strict=True)])
    assert [(command.bucket, command.sound) for command in commands] == [(8, False), (4, False), (12, True)]
    for command in commands:
        tower.encode(command)
    for (_, wanted), at in zip(things, rows, strict=True):
        np.testing.assert_allclose(np.asarray(tower.store_MD)[at], wanted, rtol=1e-5, atol=1e-5)
    assert [(command.bucket, command.sound) for command in tower.empty()] == [
        (4, False),
        (8, False),
        (6, True),
        (12, True),
    ]
