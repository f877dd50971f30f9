"""Towers and processors of each family that reads images, against transformers on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.loading.load import build_model, fill
from models.loading.opening import open_checkpoint
from models.loading.source import resolve
from serving.media.processors import PROCESSORS
from serving.media.prompt import with_images
from tests.models import tiny_vision
from tests.models.tiny_vision import IMAGE, SIZES, TINY, picture


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request, tmp_path_factory):
    """(name, transformers' model, the opened checkpoint, its processor)."""
    folder = tmp_path_factory.mktemp("vision") / "model"
    model = tiny_vision.save(request.param, folder)
    opened = open_checkpoint(resolve(str(folder)))
    return request.param, model, opened, PROCESSORS[opened.hf_config["architectures"][0]](opened.hf_config)


def test_pixels_are_those_of_transformers_bit_for_bit(family):
    name, _, _, processor = family
    for seed, (width, height) in enumerate(SIZES):
        for mode in ("RGB", "L", "RGBA", "P"):
            image = picture(width, height, seed, mode).convert("RGB")
            if (width, height) == (999, 5) and processor.mark == "[IMG]":  # nothing would be left of it
                with pytest.raises(ValueError, match="too long"):
                    processor.patched(image)
                continue
            made = processor.patched(image)
            pixels = np.asarray(tiny_vision.read(name, [image])["pixel_values"])
            np.testing.assert_array_equal(made.patches_PX, patches_of(pixels, made.place_P2, made.patches_PX.shape))
            assert len(made.place_P2) == len(made.patches_PX)


def patches_of(pixels: np.ndarray, place_P2: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """transformers' pixels as patches, tile by tile where it has not cut them itself."""
    if pixels.ndim < 4:
        return pixels.reshape(shape)
    tiles = pixels.reshape(-1, *pixels.shape[-3:])
    p = int((shape[1] // 3) ** 0.5)
    rows, columns = tiles.shape[2] // p, tiles.shape[3] // p
    cut = tiles.reshape(-1, 3, rows, p, columns, p).transpose(0, 2, 4, 1, 3, 5).reshape(len(tiles), rows, columns, -1)
    tile = np.repeat(np.arange(len(tiles)), rows * columns)
    assert len(tile) == len(place_P2)
    return cut[tile, place_P2[:, 0], place_P2[:, 1]]


def test_the_tower_says_what_transformers_says(family):
    name, model, opened, processor = family
    tower = opened.family.tower
    config = tower.config(opened.hf_config)
    module = tower.build(config, build_model(opened, dtype=jnp.float32, mesh=None, max_model_len=256).build)
    beside = rf"^(?!{tower.tensors.removeprefix('^')})"
    fill(
        module,
        opened.checkpoint,
        build_model(opened).build,
        ignore=(beside, *getattr(module, "unused", ())),
        progress=False,
    )
    encode, most = jax.jit(module.encode), config.max_patches if config.tile else 256
    for seed, size in enumerate(((140, 84), (333, 217), (5, 300))):
        image = picture(*size, seed)
        made = processor.patched(image)
        patches, places = np.zeros((most, config.patch_dim), np.float32), np.zeros((most, 2), np.int32)
        count = len(made.patches_PX)
        patches[:count], places[:count] = made.patches_PX, made.place_P2
        found = np.asarray(encode(patches, places, np.int32(count)))
        if made.pick_NK is not None:
            found = np.einsum("nkm,nk->nm", found[made.pick_NK], made.share_NK)
        wanted = tiny_vision.features(name, model, image)
        assert len(wanted) == made.size
        assert np.isfinite(found).all(), "padding gives no NaN"
        np.testing.assert_allclose(found[: len(wanted)], wanted, atol=1e-4 * np.abs(wanted).max())


def test_positions_are_those_of_transformers(family):
    name, model, _, processor = family
    if not processor.three_numbers:
        pytest.skip("positions are one number")
    images = [picture(140, 84), picture(64, 300), picture(1, 1)]
    ids = [5, IMAGE, 6, 7, IMAGE, 8, IMAGE, 9, 10]
    whole, media = with_images(ids, [processor.patched(one) for one in images], [b"a", b"b", b"c"], processor)
    wanted, delta = tiny_vision.positions(name, model, whole, images)
    np.testing.assert_array_equal(media.positions_3L, wanted)
    assert media.delta == delta
    np.testing.assert_array_equal(media.positions(len(whole) - 1, len(whole) + 2)[0], wanted[0, -1] + np.arange(3))
    assert [whole[place] for item in media.items for place in item.places_N] == [IMAGE] * sum(
        i.size for i in media.items
    )
