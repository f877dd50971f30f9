"""Encoders and processors of each family that hears, against transformers on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.encoders.audio import chats as encoder
from models.loading.load import build_model, fill
from models.loading.opening import open_checkpoint
from models.loading.source import resolve
from serving.engine.device.media import frame_sizes
from serving.media.processors import PROCESSORS, audio
from serving.media.prompt import Seen, with_media
from tests.models import tiny_audio
from tests.models.tiny_audio import SECONDS, TINY
from tests.models.tiny_whisper import sound

LENGTHS = (0.01, 0.02, 0.03, 0.7, 2.5, 3.999, 4.0, 4.01, 9.3)


@pytest.fixture(scope="module", params=sorted(TINY))
def family(request, tmp_path_factory):
    """(name, transformers' model, the opened checkpoint, its processor)."""
    folder = tmp_path_factory.mktemp("audio") / "model"
    model = tiny_audio.save(request.param, folder)
    opened = open_checkpoint(resolve(str(folder)))
    return request.param, model, opened, PROCESSORS[opened.hf_config["architectures"][0]](opened.hf_config)


def test_spectrograms_and_counts_are_those_of_transformers(family):
    name, _, _, processor = family
    if name.startswith("Ultravox"):
        pytest.skip("transformers has no processor of it; its embeddings are compared")
    for seconds in LENGTHS:
        samples = sound(seconds, int(seconds * 100))[: int(seconds * 16_000) - (1 if seconds > 1 else 0)]
        pieces = processor.sound.pieces(samples)
        given, (count,) = tiny_audio.read(name, [samples])
        assert sum(piece.size for piece in pieces) == count
        assert len(pieces) == len(given["input_features"])
        for piece, wanted in zip(pieces, given["input_features"].numpy(), strict=True):
            frames = piece.patches_PX
            np.testing.assert_allclose(frames, wanted.T[: len(frames)], atol=1e-5)
            mask = given.get("feature_attention_mask", given.get("input_features_mask"))
            if mask is not None and len(mask) == 1:
                assert (piece.place_P2[:, 1] == audio.SOUND).sum() == mask.sum()


def test_the_encoder_says_what_transformers_says(family):
    name, model, opened, processor = family
    assert opened.hf_config["tie_word_embeddings"] is False, "whatever the network is called, it has a head"
    tower = opened.family.tower
    config = tower.config(opened.hf_config)
    module = tower.build(config, build_model(opened, dtype=jnp.float32, mesh=None, max_model_len=256).build)
    ignore = (rf"^(?!{tower.tensors.removeprefix('^')})", *module.unused)
    fill(module, opened.checkpoint, build_model(opened).build, ignore=ignore, progress=False)
    encode, per = jax.jit(module.encode), 2 * config.get("stack")
    most = config.max_patches
    sizes = (most,) if config.get("whole") else frame_sizes(most, most, config.get("chunk") or per)
    for seconds in (*LENGTHS, 31.0):
        samples, found = sound(seconds, int(seconds * 100)), []
        for piece in processor.sound.pieces(samples):
            count = len(piece.patches_PX)
            size = next(one for one in sizes if one >= count)
            frames, places = np.zeros((size, config.patch_dim), np.float32), np.zeros((size, 2), np.int32)
            frames[:count], places[:count] = piece.patches_PX, piece.place_P2
            rows = np.asarray(encode(frames, places, np.int32(count)))
            assert len(rows) == size // per and np.isfinite(rows).all(), "padding gives no NaN"
            found.append(rows[: piece.size])
        wanted = tiny_audio.features(name, model, samples)
        found = np.concatenate(found)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, atol=1e-4 * max(1e-9, np.abs(wanted).max(initial=0.0)))


def test_what_is_said_of_frames_on_both_sides_is_the_same():
    assert (audio.SOUND, audio.SILENCE) == (encoder.SOUND, encoder.SILENCE)


def test_sixty_seconds_in_published_windows():
    """Spectrograms of 30 s and 128 bands."""
    samples = sound(60.0, 3)[:-77]
    config = {"max_source_positions": 1500, "num_mel_bins": 128, "hidden_size": 1280, "intermediate_size": 5120}
    hf = {"audio_config": config, "preprocessor": {"feature_size": 128, "chunk_length": 30}}
    made = tiny_audio.extractor(30, 128)
    first = audio.AudioProcessor.qwen2(hf).sound.pieces(samples)
    assert [piece.size for piece in first] == [750], "what is behind the first window is not heard"
    wanted = made(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(first[0].patches_PX, wanted.T, atol=1e-5)
    both = audio.AudioProcessor.voxtral(hf).sound.pieces(samples)
    assert [piece.size for piece in both] == [375, 375]
    how = {"padding": True, "truncation": False, "pad_to_multiple_of": 480_000}
    wanted = made(samples, sampling_rate=16_000, return_tensors="np", **how)["input_features"][0]
    np.testing.assert_allclose(np.concatenate([piece.patches_PX for piece in both]), wanted.T, atol=1e-5)
    sounds = audio.AudioProcessor.ultravox(hf | {"eos_token_id": [1, 2], "stack_factor": 8}).sound
    assert sum(piece.size for piece in sounds.pieces(samples)) == 188 + 188 and sounds.token == 2
    assert sounds.most_seconds(188) == 30.0 and sounds.most_seconds(1) == 0.16
    assert audio.AudioProcessor.voxtral(hf).sound.most_seconds(374) == 0.0


def test_a_sound_too_short_to_be_heard_leaves_nothing_in_the_prompt():
    hf = {"audio_config": {"max_source_positions": SECONDS * 50, "num_mel_bins": 16}, "audio_token_index": 9}
    processor = audio.AudioProcessor.qwen2(hf)
    pieces = tuple(processor.sound.pieces(np.zeros(100, np.float32)))
    ids, media = with_media([1, 9, 2], [Seen(pieces, (b"a",), sound=True)], processor)
    assert ids == [1, 2] and not media.items and media.length == 2


@pytest.mark.parametrize(
    ("said", "match"),
    [({"hop_length": 320}, "hop_length is 320"), ({"feature_size": 80}, "feature_size is 80"), ({"dither": 0.1}, "dither"),
     ({"chunk_length": 10}, "chunk_length is 10"), ({"sampling_rate": 8000}, "sampling_rate")],
)  # fmt: skip
def test_spectrograms_of_another_kind_are_refused(said, match):
    with pytest.raises(ValueError, match=match):
        audio.AudioProcessor.qwen2({"audio_config": {"num_mel_bins": 128}, "preprocessor": said})


def test_what_cannot_be_served_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="no text_config"):
        encoder.ultravox_audio({"hidden_size": 8, "text_model_id": "some/llama"})
    with pytest.raises(ValueError, match="no audio_config"):
        encoder.qwen2_audio({"hidden_size": 8})
    with pytest.raises(ValueError, match="d_model is 'wide'"):
        encoder.qwen2_audio({"hidden_size": 8, "audio_config": {"d_model": "wide"}})
