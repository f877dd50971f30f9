"""Towers and processors of each family that reads images, against transformers on tiny random checkpoints."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from models.loading.load import build_model, fill
from models.loading.opening import open_checkpoint
from models.loading.source import resolve
from ops.paged_attention import whole
from serving.media.processors import PROCESSORS
from serving.media.prompt import Seen, with_media
from tests.models import tiny_llama4, tiny_video, tiny_vision
from tests.models.tiny_video import clip
from tests.models.tiny_vision import IMAGE, SIZES, TINY, VIDEO, picture

ALIKE = ("GLM-4.5V", "GLM-4.6V", "Qwen3.5 MoE")
"""Whose towers and processors are another's."""
FAMILIES = [pytest.param(name, marks=pytest.mark.slow if name in ALIKE else ()) for name in sorted(TINY)]


@pytest.fixture(scope="module", params=FAMILIES)
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
            if name == "Llama 4":  # transformers scales with torch alone
                pixels = patches_of(tiny_llama4.by_torch(image), made.place_P2, made.patches_PX.shape)
                np.testing.assert_allclose(made.patches_PX, pixels, atol=tiny_llama4.LEVEL)
                continue
            found = tiny_vision.read(name, [image])
            pixels = np.asarray(found["pixel_values"])
            if "image_position_ids" in found:  # row by row, and padded
                pixels = pixels[0, made.place_P2 @ (made.place_P2[:, 1].max() + 1, 1)]
                assert int(found["num_soft_tokens_per_image"][0]) == made.size
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


def test_llama_4s_canvases_are_those_of_transformers():
    for (tile, most), sizes in tiny_llama4.SIZES.items():
        said = {"size": {"height": tile, "width": tile}, "max_patches": most}
        hf = {"vision_config": {"image_size": tile, "patch_size": 14}, "preprocessor": said}
        processor = PROCESSORS["Llama4ForConditionalGeneration"](hf)
        for (width, height), (rows, columns, high, wide) in sizes.items():
            assert processor.grid(height, width) == (rows, columns)
            assert processor.scaled(height, width, rows * tile, columns * tile) == (high, wide)


def built(opened, quantization=None):
    """A checkpoint's tower with its weights."""
    tower = opened.family.tower
    how = build_model(opened, dtype=jnp.float32, mesh=None, max_model_len=256).build
    module = tower.build(tower.config(opened.hf_config), how)
    ignore = (rf"^(?!{tower.tensors.removeprefix('^')})", *getattr(module, "unused", ()))
    fill(module, opened.checkpoint, how, ignore=ignore, quantization=quantization, progress=False)
    return module


def test_the_tower_says_what_transformers_says(family):
    name, model, opened, processor = family
    config, module = opened.family.tower.config(opened.hf_config), built(opened)
    encode, most = jax.jit(module.encode), config.max_patches if config.tile else max(256, config.max_patches)
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


@pytest.mark.skipif(not whole.supports(2, 16, "cpu"), reason="this machine has no native kernels")
def test_a_rounded_tower_says_nearly_the_same(family):
    """Weights and products in int8, attention by the kernels: with places that turn, tiles, windows, and none of these."""
    name, _, opened, processor = family
    if name not in ROUNDED:
        pytest.skip("its patches attend as those of a tower in ROUNDED do")
    config = opened.family.tower.config(opened.hf_config)
    made = processor.patched(picture(140, 84, 1))
    count = len(made.patches_PX)
    most = -(-count // (config.tile or config.merge**2)) * (config.tile or config.merge**2) + 2 * config.tile
    patches, places = np.zeros((most, config.patch_dim), np.float32), np.zeros((most, 2), np.int32)
    patches[:count], places[:count] = made.patches_PX, made.place_P2
    exact, rounded = (
        np.asarray(jax.jit(built(opened, how).encode)(patches, places, np.int32(count)))[: count // config.merge**2]
        for how in (None, "int8")
    )
    assert np.abs(rounded - exact).max() > 0
    assert np.linalg.norm(rounded - exact) < ROUNDED[name] * np.linalg.norm(exact)


ROUNDED = {"Qwen2.5-VL": 0.1, "Gemma 4": 0.1, "Llama 4": 0.1}
"""Families of which towers are tried in int8, and how far off they may be."""


def test_positions_are_those_of_transformers(family):
    name, model, _, processor = family
    if not processor.three_numbers:
        pytest.skip("positions are one number")
    images = [picture(140, 84), picture(64, 300), picture(1, 1)]
    ids = [5, IMAGE, 6, 7, IMAGE, 8, IMAGE, 9, 10]
    seen = [Seen((processor.patched(one),), (bytes([i]),)) for i, one in enumerate(images)]
    whole, media = with_media(ids, seen, processor)
    wanted, delta = tiny_vision.positions(name, model, whole, images)
    np.testing.assert_array_equal(media.positions_3L, wanted)
    assert media.delta == delta
    np.testing.assert_array_equal(media.positions(len(whole) - 1, len(whole) + 2)[0], wanted[0, -1] + np.arange(3))
    assert [whole[place] for item in media.items for place in item.places_N] == [IMAGE] * sum(
        i.size for i in media.items
    )


CLIPS = ((7, 140, 84, 3.0), (40, 60, 200, 24.0), (4, 64, 64, None), (9, 333, 217, 1.5))
"""Frames, their width and height, and how many there are a second."""


def test_videos_are_those_of_transformers_bit_for_bit(family):
    name, _, _, processor = family
    if processor.video is None:
        pytest.skip("it reads none")
    for frames, width, height, fps in CLIPS:
        for said in ({}, {"fps": 1.0, "do_sample_frames": True}, {"num_frames": 4, "do_sample_frames": True}):
            if name.startswith("GLM") and "num_frames" in said:
                continue  # transformers does not look at it
            fps = 24.0 if (said or name.startswith("GLM")) and fps is None else fps
            pixels = clip(frames, width, height)
            other = {"fps": None} if "num_frames" in said else {"num_frames": None} if "fps" in said else {}
            given, (text,) = tiny_video.read(name, [(pixels, fps)], **other | said)
            times = processor.video.sampling.asked(said).chosen(frames, fps, False)
            high, wide = processor.video.size(len(times.indices), height, width)
            scaled = [processor.video.scaling.resized(Image.fromarray(pixels[i]), wide, high) for i in times.indices]
            pieces = processor.video.patched([np.asarray(one) for one in scaled], times)
            wanted = given["pixel_values_videos"].numpy()
            for piece, part in zip(
                pieces,
                np.split(wanted.reshape(-1, *wanted.shape[-3:]) if wanted.ndim > 3 else wanted, len(pieces)),
                strict=True,
            ):
                if name == "Gemma 4":  # row by row, and padded
                    part = part[0, piece.place_P2 @ (piece.place_P2[:, 1].max() + 1, 1)]
                np.testing.assert_array_equal(
                    piece.patches_PX, patches_of(part, piece.place_P2, piece.patches_PX.shape)
                )
            assert sum(piece.size for piece in pieces) == processor.video.count(len(scaled), high, wide)
            mark = TINY[name].tokens[2 if name.startswith("GLM") else 3]
            assert sum(piece.size for piece in pieces) == text.count(mark)
            if processor.video.mark:
                assert pieces[0].written == re.sub(f"({re.escape(mark)})+", mark, text)


def test_positions_of_videos_are_those_of_transformers(family):
    name, model, _, processor = family
    if processor.video is None or not processor.three_numbers:
        pytest.skip("positions are one number, or it reads none")
    image, clips = picture(140, 84), [(clip(9, 140, 84), 2.0), (clip(4, 60, 200), 24.0)]
    pieces = []
    for frames, fps in clips:
        times = processor.video.sampling.chosen(len(frames), fps, False)
        high, wide = processor.video.size(len(times.indices), *frames.shape[1:3])
        resized = [np.asarray(Image.fromarray(frames[i]).resize((wide, high))) for i in times.indices]
        pieces.append(tuple(processor.video.patched(resized, times)))
    first, second = (Seen(own, (b"a",) * len(own), video=True) for own in pieces)
    marks = [[processor.video.placeholder] * sum(1 - piece.joins for piece in own) for own in pieces]
    if processor.video.written:  # grids with something written between them
        marks = [[token for mark in own for token in (mark, 9)] for own in marks]
    if processor.video.placeholder == IMAGE:
        marks = [[VIDEO + 1, *own, VIDEO + 2] for own in marks]
    ids = [5, *marks[0], 6, IMAGE, 8, *marks[1], 9, 10]
    whole, media = with_media(ids, [first, Seen((processor.patched(image),), (b"c",)), second], processor)
    wanted, delta = tiny_vision.positions(name, model, whole, [image], tiny_video.read(name, clips)[0])
    np.testing.assert_array_equal(media.positions_3L, wanted)
    assert media.delta == delta


def test_long_images_are_cut_for_gemma_3_as_transformers_cuts_them(tmp_path):
    import transformers

    tiny_vision.save("Gemma 3", tmp_path)
    opened = open_checkpoint(resolve(str(tmp_path)))
    how = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 64, "pan_and_scan_max_num_crops": 3}
    processor = PROCESSORS["Gemma3ForConditionalGeneration"](opened.hf_config)
    for size in ((140, 84), (333, 217), (640, 100), (90, 640), (200, 200), (127, 63)):
        image = picture(*size)
        pieces = processor.asked(how).pieces(image)
        found = tiny_vision.oracle_processor("Gemma 3")(
            images=[image], return_tensors="np", pan_and_scan_min_ratio_to_activate=1.2, **how
        )
        wanted = np.asarray(found["pixel_values"])
        assert len(pieces) == len(wanted)
        for piece, pixels in zip(pieces, wanted, strict=True):
            np.testing.assert_array_equal(
                piece.patches_PX, patches_of(pixels[None], piece.place_P2, piece.patches_PX.shape)
            )
        whole = "\n\n<start_of_image><image_soft_token><end_of_image>\n\n"
        own = types.SimpleNamespace(full_image_sequence=whole)
        assert pieces[0].written == transformers.Gemma3Processor.replace_image_token(own, found, 0)
        assert len(processor.pieces(image)) == 1
    for wrong in ({"do_pan_and_scan": 1}, {"pan_and_scan_max_num_crops": 0}, {"size": 3}):
        with pytest.raises(ValueError, match=r"must be|cannot be changed"):
            processor.asked(wrong)


ODD = {
    "no scaling of levels": ("Qwen2-VL", {"do_rescale": False}, {}),
    "levels as they are": ("Gemma 3", {"do_rescale": False, "do_normalize": False}, {}),
    "not normalized": ("InternVL", {"do_normalize": False}, {}),
    "one number for all channels": ("Pixtral", {"image_mean": 0.5, "image_std": 0.25}, {}),
    "a filter of its own": ("Idefics3", {"resample": 4}, {}),
    "sizes left alone": ("LLaVA-NeXT", {"do_resize": False}, {}),
    "squares of one": ("Qwen2-VL", {"merge_size": 1, "patch_size": 10}, {}),
    "three frames": ("Qwen3-VL", {"temporal_patch_size": 3}, {}),
    "more cut out than there is": ("LLaVA 1.5", {"size": {"shortest_edge": 60}}, {}),
    "nothing cut out": ("LLaVA 1.5", {"size": {"height": 84, "width": 84}, "do_center_crop": False}, {}),
    "a small image in tiles": ("Idefics3", {"size": {"longest_edge": 40}}, {}),
    "two tiles at least": ("InternVL", {"min_patches": 2}, {}),
    "not square": ("Pixtral", {"size": {"height": 96, "width": 64}}, {}),
}
"""Processors' files that no published checkpoint has."""


@pytest.mark.parametrize("what", ODD)
def test_odd_processors_are_followed_bit_for_bit(what, monkeypatch):
    name, said, vision = ODD[what]
    tiny = dataclasses.replace(
        TINY[name], processor={**TINY[name].processor, **said}, vision={**TINY[name].vision, **vision}
    )
    monkeypatch.setitem(TINY, name, tiny)
    made = json.loads(tiny_vision.oracle_processor(name).to_json_string())
    hf = {"architectures": [tiny.model], "vision_config": dict(tiny.vision), "preprocessor": made, **tiny.ids}
    processor = PROCESSORS[tiny.model](hf)
    for seed, size in enumerate(((1, 1), (140, 84), (333, 217), (5, 300))):
        if what == "not square" and size == (5, 300):
            continue  # nothing would be left of it
        image = picture(*size, seed)
        found = processor.pieces(image)[0]
        wanted = np.asarray(tiny_vision.read(name, [image])["pixel_values"])
        np.testing.assert_array_equal(found.patches_PX, patches_of(wanted, found.place_P2, found.patches_PX.shape))
