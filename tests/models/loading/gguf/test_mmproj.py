"""Towers in GGUF against the same in safetensors: configuration, processor, every tensor; and files that are refused."""

import json

import numpy as np
import pytest

from models.loading.gguf.mmproj import find_mmproj, open_mmproj
from models.loading.opening import open_checkpoint, with_mmproj
from models.loading.source import resolve
from serving.boot.senses.tower import why_not
from serving.media.processors import PROCESSORS
from tests.models import tiny_mmproj, tiny_vision
from tests.models.tiny_mmproj import KINDS, TEXT, rewritten, tokens_of
from tests.models.tiny_vision import TINY, picture


@pytest.fixture(scope="module", params=sorted(KINDS))
def both(request, tmp_path_factory):
    """(name, the opened checkpoint, the tower's file opened)."""
    name, folder = request.param, tmp_path_factory.mktemp("mmproj")
    tiny_vision.save(name, folder / "model")
    tiny_mmproj.write(name, folder / "model", folder / "mmproj-tiny-f32.gguf")
    opened = open_checkpoint(resolve(str(folder / "model")))
    found = find_mmproj(folder / "model.gguf", None)
    return name, opened, open_mmproj(found, opened.hf_config, tokens_of(name), TEXT[name])


def test_a_tower_is_the_same_in_both_forms(both):
    name, opened, eyes = both
    tower = opened.family.tower
    assert eyes.architecture == opened.hf_config["architectures"][0]
    hf = {**opened.hf_config, **eyes.config}
    ours, theirs = (tower.config(each) for each in (hf, opened.hf_config))
    leave = {"extra", "max_patches", "norm_eps"} | ({"num_layers"} if name == "LLaVA 1.5" else set())
    for field in vars(theirs):
        assert field in leave or getattr(ours, field) == getattr(theirs, field), field
    assert ours.norm_eps == pytest.approx(theirs.norm_eps, rel=1e-6)
    own = dict(theirs.extra)
    assert {key: value for key, value in ours.extra if key != "layers"} == {
        k: v for k, v in own.items() if k != "layers"
    }
    stored = opened.checkpoint
    for tensor in eyes.checkpoint.own_names:
        assert stored.locate(tensor) is not None, tensor
        assert eyes.checkpoint.shape(tensor) == stored.shape(tensor), tensor
        np.testing.assert_allclose(eyes.checkpoint.read(tensor), stored.read(tensor), atol=1e-6, err_msg=tensor)
    wanted = {
        stored.canonical(one)
        for one in stored.own_names
        if one.count("visual.") + one.count("vision_") + one.count("multi_modal_projector") + one.count("connector")
    }
    missing = wanted - set(eyes.checkpoint.own_names)
    assert all(
        "mask_token" in one or ".head." in one or (name == "LLaVA 1.5" and "layers.2." in one) for one in missing
    ), missing


def test_images_are_cut_alike(both):
    _, opened, eyes = both
    hf = {**opened.hf_config, **eyes.config}
    ours, theirs = (PROCESSORS[eyes.architecture](each) for each in (hf, opened.hf_config))
    assert (ours.placeholder, ours.mark, ours.together) == (theirs.placeholder, theirs.mark, theirs.together)
    for size in ((140, 84), (333, 217), (5, 300)):
        mine, its = ours.patched(picture(*size)), theirs.patched(picture(*size))
        assert mine.runs == its.runs and mine.written == its.written
        np.testing.assert_array_equal(mine.patches_PX, its.patches_PX)


CHANGES = {
    "another kind": (lambda f, t: f.update({"clip.projector_type": "ldp"}), "projector 'ldp' is not read"),
    "no tower": (lambda f, t: f.update({"general.architecture": "llama"}), "is no file that reads images"),
    "no patch size": (lambda f, t: f.pop("clip.vision.patch_size"), "no clip.vision.patch_size"),
    "no layer": (lambda f, t: t.pop("v.blk.0.ffn_up.weight"), "damaged"),
    "another tensor": (lambda f, t: t.update({"v.other.weight": t["v.post_ln.weight"]}), "'v.other.weight'"),
    "no mean": (lambda f, t: f.pop("clip.vision.image_mean"), "image_mean"),
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    tiny_vision.save("Gemma 3", folder / "model")
    tiny_mmproj.write("Gemma 3", folder / "model", folder / "mmproj.gguf")
    return folder, json.loads((folder / "model" / "config.json").read_text())["text_config"]


@pytest.mark.parametrize("what", CHANGES)
def test_files_that_are_refused(gemma, tmp_path, what):
    folder, text = gemma
    change, words = CHANGES[what]
    path = rewritten(folder / "mmproj.gguf", tmp_path / "mmproj.gguf", change)
    with pytest.raises(ValueError, match=words):
        open_mmproj(path, text, tokens_of("Gemma 3"), "gemma3")


def test_what_does_not_go_together_is_refused(gemma, tmp_path):
    folder, text = gemma
    path, tokens = folder / "mmproj.gguf", tokens_of("Gemma 3")
    with pytest.raises(ValueError, match="beside a model of the architecture 'llama'"):
        open_mmproj(path, text, tokens, "llama")
    with pytest.raises(ValueError, match="no token '<image_soft_token>'"):
        open_mmproj(path, text, tokens[:-1], "gemma3")
    with pytest.raises(ValueError, match="there is no file"):
        find_mmproj(folder / "model.gguf", str(tmp_path / "none.gguf"))
    assert find_mmproj(tmp_path / "model.gguf", None) is None
    (tmp_path / "mmproj.gguf").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"damaged|truncated|holds"):
        open_mmproj(tmp_path / "mmproj.gguf", text, tokens, "gemma3")
    assert TINY["Gemma 3"].tokens[2] == "<image_soft_token>"


def test_a_gguf_model_finds_its_tower_beside_it(gemma, tmp_path):
    folder, text = gemma
    path = tmp_path / "tiny.gguf"
    tiny_mmproj.write_text("Gemma 3", folder / "model", path)
    opened = open_checkpoint(resolve(str(path)))
    assert with_mmproj(opened, None) is opened, "nothing lies beside it"
    eyes = folder / "mmproj.gguf"
    (tmp_path / "mmproj-tiny.gguf").write_bytes(eyes.read_bytes())
    for seen in (with_mmproj(opened, None), with_mmproj(opened, str(eyes))):
        assert seen.hf_config["architectures"] == ["Gemma3ForConditionalGeneration"]
        assert seen.tower is not None and seen.family.tower.config(seen.hf_config).out_dim == text["hidden_size"]
        assert why_not(seen) is None
    assert with_mmproj(opened, "") is opened
    (tmp_path / "mmproj-tiny.gguf").write_bytes(eyes.read_bytes()[:500])
    with pytest.raises(ValueError, match="It lies beside the model"):
        with_mmproj(opened, None)
    with pytest.raises(ValueError, match="only GGUF models"):
        with_mmproj(open_checkpoint(resolve(str(folder / "model"))), str(eyes))
