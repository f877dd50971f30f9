"""Sound to features as transformers makes them, and files that are none."""

import numpy as np
import pytest
import soundfile

from serving.errors import RequestError
from serving.media.sound import Resampler, read_sound, resampled
from serving.media.sound import files as sound
from serving.media.sound.spectrum import Spectrogram, log_mel
from tests.models import tiny_whisper
from tests.models.tiny_whisper import wav


@pytest.mark.parametrize(("seconds", "mels"), [(5.3, 80), (12.0, 128), (30.0, 80)])
def test_spectrograms_are_those_of_transformers(seconds, mels):
    import transformers

    samples = tiny_whisper.sound(seconds)
    oracle = transformers.WhisperFeatureExtractor(feature_size=mels)
    padded = np.pad(samples, (0, 480_000 - len(samples)))
    found = log_mel(padded, mels)
    assert found.shape == (3000, mels) and found.dtype == np.float32
    exact = oracle._np_extract_fbank_features(padded[None], "cpu")[0].T
    np.testing.assert_allclose(found, exact, atol=1e-5)
    fast = oracle(samples, sampling_rate=16_000, return_tensors="np")["input_features"][0].T
    np.testing.assert_allclose(found, fast, atol=5e-5)  # torch's transform, in float32


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
def test_another_rate_is_the_same_sound(rate):
    t = np.arange(rate) / rate
    found = resampled(np.sin(2 * np.pi * 440 * t).astype(np.float32), rate)
    wanted = np.sin(2 * np.pi * 440 * np.arange(len(found)) / 16_000)
    assert abs(len(found) - 16_000) <= 1
    np.testing.assert_allclose(found[200:-200], wanted[200:-200], atol=1e-4)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100, 48_000])
def test_piece_by_piece_is_the_same(rate):
    random = np.random.default_rng(rate)
    samples = random.standard_normal(30_001).astype(np.float32)
    samples[9_000:20_000] = 0
    resampler, spectrogram, pieces = Resampler(rate), Spectrogram(), []
    for piece in np.split(samples, np.sort(random.integers(0, len(samples), 20))):
        pieces.append(resampler.push(piece))
        spectrogram.push(piece)
    found = np.concatenate([*pieces, resampler.finish()])
    np.testing.assert_allclose(found, resampled(samples, rate), atol=1e-6)
    assert np.array_equal(spectrogram.finish(), log_mel(samples))


@pytest.mark.parametrize("count", [0, 1, 160, 200, 201, 400, 561])
def test_short_sounds(count):
    import transformers

    samples = tiny_whisper.sound(1.0)[:count]
    found = log_mel(samples)
    assert found.shape == (count // 160, 80) and np.isfinite(found).all()
    if count > 200:  # shorter ones cannot be mirrored, and transformers fails
        exact = transformers.WhisperFeatureExtractor()._np_extract_fbank_features(samples[None], "cpu")[0].T
        np.testing.assert_allclose(found, exact, atol=1e-5)


def test_what_lies_beyond_the_rate_is_no_sound():
    t = np.arange(48_000) / 48_000
    assert np.abs(resampled(np.sin(2 * np.pi * 12_000 * t).astype(np.float32), 48_000)[200:-200]).max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "VORBIS"), ("MP3", None)]
)
def test_files_and_channels(kind, subtype):
    samples = tiny_whisper.sound(0.5) * 0.5
    both = np.stack([samples, samples], 1)
    found = read_sound(wav(both, kind=kind, subtype=subtype), 10, "file")
    assert abs(len(found) - len(samples)) < 3000
    assert np.corrcoef(found[: len(samples)][:7000], samples[:7000])[0, 1] > (0.999 if kind in ("WAV", "FLAC") else 0.5)


def test_bad_files_are_refused_in_the_same_words():
    whole = wav(tiny_whisper.sound(0.2), subtype="PCM_16")
    words = set()
    for data in (b"", b"RIFF", b"hello" * 100, whole[:20], b"\x89PNG\r\n\x1a\n" + bytes(100)):
        with pytest.raises(RequestError) as refused:
            read_sound(data, 10, "file")
        words.add(refused.value.message)
    assert words == {"file cannot be read as sound. WAV, FLAC, Ogg and MP3 are."}
    for odd in (wav(np.full(1000, np.nan, np.float32)), wav(np.zeros((1000, 9), np.float32))):
        with pytest.raises(RequestError, match="cannot be read"):
            read_sound(odd, 10, "file")


def test_other_formats_are_not_opened(monkeypatch):
    """The library would read them, and tell behind it which they were."""
    made, samples, tag = {}, tiny_whisper.sound(0.2), b"ID3\x04\0\0" + bytes((0, 0, 1, 2))
    for kind in (
        "AU",
        "CAF",
        "MAT4",
        "MAT5",
        "PAF",
        "SVX",
        "VOC",
        "W64",
        "RF64",
        "SDS",
        "NIST",
        "XI",
        "IRCAM",
        "AVR",
        "HTK",
    ):
        made[kind] = wav(samples, 44_100, kind, "DPCM_16" if kind == "XI" else "PCM_16")
    monkeypatch.setattr(soundfile, "SoundFile", lambda *a: pytest.fail("opened"))
    for whole in made.values():
        for data in (whole, tag + bytes(130) + whole, tag + tag + bytes(120)):
            with pytest.raises(RequestError, match="cannot be read as sound"):
                read_sound(data, 10, "file")
            assert sound.said_seconds(data) == 0.0


def test_tags_may_stand_in_front():
    samples, tag = tiny_whisper.sound(0.5), b"ID3\x04\0\0" + bytes((0, 0, 1, 2)) + bytes(130)
    for kind, subtype in (("MP3", None), ("FLAC", "PCM_16")):
        whole = wav(samples, kind=kind, subtype=subtype)
        np.testing.assert_array_equal(read_sound(tag + whole, 10, "file"), read_sound(whole, 10, "file"))


def test_length_is_what_is_there_and_bounded(monkeypatch):
    whole = bytearray(wav(tiny_whisper.sound(2.0), subtype="PCM_16"))
    whole[40:44] = (2**31 - 1).to_bytes(4, "little")  # the header says that there is more
    assert len(read_sound(bytes(whole), 3, "file")) == 32_000
    monkeypatch.setattr(sound.Resampler, "push", lambda *a: pytest.fail("went on"))
    with pytest.raises(RequestError, match="longer than 1 seconds"):
        read_sound(wav(tiny_whisper.sound(2.0)), 1, "file")


def test_reading_a_file_may_take_so_long_by_itself(monkeypatch):
    """What others do between two of its pieces is not counted."""
    clock, push = [0.0], sound.Resampler.push

    def slow(self, samples):
        clock[0] += cost
        return push(self, samples)

    monkeypatch.setattr(sound.time, "thread_time", lambda: clock[0])
    monkeypatch.setattr(sound, "PIECE", 1 << 12)
    monkeypatch.setattr(sound.Resampler, "push", slow)
    data, cost = wav(tiny_whisper.sound(1.0)), 0.1
    for _ in sound.sound_pieces(data, 60, "file", 1.0):
        clock[0] += 5.0
    cost = 0.5
    with pytest.raises(RequestError, match="took more than 1 seconds"):
        read_sound(data, 60, "file", 1.0)
