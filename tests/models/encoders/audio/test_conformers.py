"""Encoders and processors of families that hear with a conformer, against transformers on tiny random checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.encoders.audio.gemma3n import gemma3n_audio
from models.encoders.audio.gemma4 import gemma4_audio
from models.encoders.audio.granite_speech import granite_speech
from models.loading.load import build_model, fill
from models.loading.opening import open_checkpoint
from models.loading.source import resolve
from serving.engine.device.media import frame_sizes
from serving.media.processors import PROCESSORS
from serving.media.processors.conformers import GEMMA4, Gemma3nProcessor
from serving.media.sound.frames import LogMel
from tests.models import tiny_conformers, tiny_granite
from tests.models.hearing import MADE_BY
from tests.models.tiny_whisper import sound

GRANITE = {"hidden_size": 8, "encoder_config": {}, "projector_config": {"encoder_hidden_size": 1024}}
LENGTHS = (0.04, 0.07, 0.7, 2.5, 5.1)


@pytest.fixture(scope="module", params=sorted({**tiny_conformers.TINY, **tiny_granite.TINY}))
def family(request, tmp_path_factory):
    """(name, transformers' model, the opened checkpoint, its processor)."""
    folder = tmp_path_factory.mktemp("conformers") / "model"
    model = MADE_BY[request.param].save(request.param, folder)
    opened = open_checkpoint(resolve(str(folder)))
    return request.param, model, opened, PROCESSORS[opened.hf_config["architectures"][0]](opened.hf_config)


def samples_of(seconds: float) -> np.ndarray:
    return sound(seconds, int(seconds * 100))[: int(seconds * 16_000) - (1 if seconds > 1 else 0)]


def test_spectrograms_and_counts_are_those_of_transformers(family):
    name, _, _, processor = family
    for seconds in LENGTHS:
        (piece,) = processor.sound.pieces(samples_of(seconds))
        (given,), (count,) = MADE_BY[name].read(name, [samples_of(seconds)])
        assert piece.size == count
        if name == "Granite Speech":
            wanted = given[0].numpy()
        else:
            wanted = given["input_features"][0].numpy()[given["input_features_mask"][0].numpy()]
        assert piece.patches_PX.shape == wanted.shape
        np.testing.assert_allclose(piece.patches_PX, wanted, atol=1e-5)


def ears_of(opened, quantization=None):
    """(what hears a sound, with its weights, its configuration)."""
    tower = opened.family.tower
    config = tower.config(opened.hf_config)
    how = build_model(opened, dtype=jnp.float32, mesh=None, max_model_len=256).build
    module = tower.build(config, how)
    ignore = (rf"^(?!{tower.tensors.removeprefix('^')})", *module.unused)
    fill(module, opened.checkpoint, how, ignore=ignore, quantization=quantization, progress=False)
    return jax.jit(module.encode if config.ears is None else module.hear), config.ears or config


@pytest.mark.slow
def test_a_rounded_encoder_says_nearly_the_same(family):
    """Weights and products in int8."""
    _, _, opened, processor = family
    (piece,) = processor.sound.pieces(samples_of(2.5))
    found = []
    for how in (None, "int8"):
        encode, config = ears_of(opened, how)
        size = frame_sizes(1000, config.max_patches, config.get("chunk") or config.get("per"))[0]
        frames = np.zeros((size, config.patch_dim), np.float32)
        frames[: len(piece.patches_PX)] = piece.patches_PX
        count = np.int32(len(piece.patches_PX))
        found.append(np.asarray(encode(frames, np.zeros((size, 2), np.int32), count))[: piece.size])
    exact, rounded = found
    assert 0 < np.linalg.norm(rounded - exact) < 0.15 * np.linalg.norm(exact)


def test_the_encoder_says_what_transformers_says(family):
    name, model, opened, processor = family
    encode, config = ears_of(opened)
    per, most = config.get("per"), config.max_patches
    for seconds in LENGTHS:
        (piece,) = processor.sound.pieces(samples_of(seconds))
        count = len(piece.patches_PX)
        size = next(one for one in frame_sizes(most, most, config.get("chunk") or per) if one >= count)
        frames, places = np.full((size, config.patch_dim), 7.0, np.float32), np.zeros((size, 2), np.int32)
        frames[:count] = piece.patches_PX
        rows = np.asarray(encode(frames, places, np.int32(count)))
        assert len(rows) == (config.get("always") or size // per) and np.isfinite(rows).all(), "padding gives no NaN"
        wanted = MADE_BY[name].features(name, model, samples_of(seconds))
        assert piece.size == len(wanted)
        np.testing.assert_allclose(rows[: piece.size], wanted, atol=1e-4 * np.abs(wanted).max())


def test_half_a_minute_in_published_frames():
    """128 bands; a sound that is longer is cut."""
    import transformers

    samples = sound(33.0, 3)
    first = Gemma3nProcessor.of({}).sound.pieces(samples)[0]
    wanted = transformers.Gemma3nAudioFeatureExtractor()([samples], return_tensors="np")["input_features"][0]
    assert first.size == 188 and first.patches_PX.shape == wanted.shape == (2997, 128)
    np.testing.assert_allclose(first.patches_PX, wanted, atol=1e-5)
    second = PROCESSORS["Gemma4ForConditionalGeneration"]({"audio_config": {}}).sound.pieces(samples)[0]
    wanted = transformers.Gemma4AudioFeatureExtractor()([samples], return_tensors="np")["input_features"][0]
    assert second.size == 750
    np.testing.assert_allclose(second.patches_PX, wanted[: len(second.patches_PX)], atol=1e-5)
    third = PROCESSORS["GraniteSpeechForConditionalGeneration"]({}).sound
    (wanted,), (count,) = tiny_granite.read("Granite Speech", [samples], 80)
    (piece,) = third.pieces(samples)
    assert piece.size == count == 330 and third.most_seconds(330) == 33.0 and third.most_seconds(10**6) == 300.0
    np.testing.assert_allclose(piece.patches_PX, wanted[0], atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{"preemphasis": 0.9, "preemphasis_htk_flavor": False}, {"input_scale_factor": 3.0, "mel_floor": 0.5},
     {"per_bin_mean": [0.5] * 16, "per_bin_stddev": [2.0] * 16}, {"frame_length_ms": 25.0, "hop_length_ms": 12.5}],
)  # fmt: skip
def test_spectrograms_of_other_settings_are_those_of_transformers(how):
    import transformers

    samples = sound(0.5, 4)[:7808]  # whole steps, of which nothing is padded
    made = LogMel.of({"feature_size": 16, **how}, GEMMA4, added=True)
    wanted = transformers.Gemma4AudioFeatureExtractor(feature_size=16, **how)([samples], return_tensors="np")
    found = made.frames(np.pad(samples, (made.length // 2, 0)))
    np.testing.assert_allclose(found[:-3], wanted["input_features"][0][: len(found) - 3], atol=1e-5)


def test_noise_louder_than_sound_can_be_makes_numbers():
    loud = np.full(9000, 3e38, np.float32)
    loud[::2] *= -1
    for name, hf in (("Gemma3n", {}), ("Gemma4", {"audio_config": {}}), ("GraniteSpeech", {})):
        (piece,) = PROCESSORS[f"{name}ForConditionalGeneration"](hf).sound.pieces(loud)
        assert np.isfinite(piece.patches_PX).all()


def test_what_cannot_be_served_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match="dither"):
        LogMel.of({"dither": 0.1}, GEMMA4, added=True)
    with pytest.raises(ValueError, match="5 bands have a mean"):
        LogMel.of({"per_bin_mean": [0.0] * 5}, GEMMA4, added=True)
    with pytest.raises(ValueError, match="feature_size is 80; the encoder hears 128"):
        PROCESSORS["Gemma4ForConditionalGeneration"]({"audio_config": {}, "sound_preprocessor": {"feature_size": 80}})
    with pytest.raises(ValueError, match="see 12 back and 4 ahead in chunks of 12"):
        gemma4_audio({"hidden_size": 8, "audio_config": {"attention_context_right": 4}})
    with pytest.raises(ValueError, match="sscp_conv_kernel_size"):
        gemma3n_audio({"hidden_size": 8, "vocab_size": 9, "audio_config": {"sscp_conv_kernel_size": [[5, 5], [3, 3]]}})
    with pytest.raises(ValueError, match="n_mels is 64; the encoder reads 160"):
        PROCESSORS["GraniteSpeechForConditionalGeneration"]({"preprocessor": {"n_mels": 64}})
    with pytest.raises(ValueError, match="no encoder_config and projector_config"):
        granite_speech({"hidden_size": 8})
    with pytest.raises(ValueError, match="window_size is 15 and downsample_rate 4"):
        granite_speech({**GRANITE, "downsample_rate": 4})
    assert gemma4_audio({"hidden_size": 8}) is None, "the larger sizes have no ears"
