"""Sound files to samples at Whisper's rate, and those to log-mel spectrograms: numpy alone, equal to transformers' features."""

from __future__ import annotations

import functools
import io
import math

import numpy as np

from serving.errors import RequestError, invalid

RATE = 16_000
HOP, FFT = 160, 400
FORMATS = ("WAV", "FLAC", "OGG", "MP3", "WAVEX", "AIFF")
MAX_CHANNELS = 8
ZEROS = 24
"""Zero crossings of the resampling filter on each side."""


def read_sound(data: bytes, max_seconds: float, place: str) -> np.ndarray:
    """A file's sound as float32 samples at `RATE`, its channels averaged. Blocks.

    Args:
        place: the field that has it, for errors.
    Raises:
        RequestError: INVALID_ARGUMENT, in the same words whatever is wrong inside; longer than `max_seconds`.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels = file.samplerate, file.channels
            if file.format not in FORMATS or not 1 <= channels <= MAX_CHANNELS or not 1000 <= rate <= 384_000:
                raise _unreadable(place)
            most = int(max_seconds * rate)  # of what is there, whatever the header says
            pieces, total = [], 0
            while len(piece := file.read(1 << 18, dtype="float32", always_2d=True)):
                total += len(piece)
                if total > most:
                    raise invalid(f"{place} is longer than {max_seconds:g} seconds.", place)
                pieces.append(piece.mean(axis=1))
    except RequestError:
        raise
    except Exception:  # whatever a damaged file makes the library raise
        raise _unreadable(place) from None
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not np.isfinite(samples).all():
        raise _unreadable(place)
    return resampled(samples, rate)


def _unreadable(place: str) -> RequestError:
    return invalid(f"{place} cannot be read as sound. WAV, FLAC, Ogg and MP3 are.", place)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 at `RATE`: a windowed sinc, one filter for each of the places between samples that are asked for."""
    if rate == RATE or not len(samples):
        return samples.astype(np.float32)
    common = math.gcd(rate, RATE)
    up, down = RATE // common, rate // common
    cutoff = min(1.0, up / down) * 0.95
    half = math.ceil(ZEROS / cutoff)
    count = -(-len(samples) * up // down)
    padded = np.pad(samples.astype(np.float64), (half, half + 1))
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    out = np.empty(count)
    offsets = np.arange(-half, half + 1)
    for phase in range(min(up, count)):
        at = phase * down
        first, part = at // up, (at % up) / up
        x = offsets - part
        taps = cutoff * np.sinc(cutoff * x) * np.cos(np.pi * np.clip(x / (half + 1), -1, 1) / 2) ** 2
        here = len(range(phase, count, up))
        out[phase::up] = windows[first : first + here * down : down][:here] @ (taps / taps.sum())
    return out.astype(np.float32)


@functools.lru_cache(maxsize=4)
def mel_filters(mels: int) -> np.ndarray:
    """float64 [201, mels]: triangles, evenly spaced on Slaney's scale from 0 to 8000 Hz, each of the same area."""

    def to_hertz(mel: np.ndarray) -> np.ndarray:
        linear = mel * 200.0 / 3
        return np.where(mel >= 15, 1000.0 * np.exp(np.log(6.4) / 27.0 * (mel - 15.0)), linear)

    top = 15.0 + np.log(8000.0 / 1000.0) * 27.0 / np.log(6.4)
    edges = to_hertz(np.linspace(0.0, top, mels + 2))
    bins = np.linspace(0, RATE // 2, FFT // 2 + 1)
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * (2.0 / (edges[2:] - edges[:-2]))


def log_mel(samples: np.ndarray, mels: int = 80) -> np.ndarray:
    """float32 [len(samples) / HOP, mels]: the spectrogram that Whisper reads (arXiv:2212.04356), a frame each 10 ms."""
    frames = len(samples) // HOP
    padded = np.pad(samples.astype(np.float64), FFT // 2, mode="reflect" if len(samples) > FFT // 2 else "constant")
    windows = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP][:frames]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT) / FFT)
    power = np.abs(np.fft.rfft(windows * window, axis=1)) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(mels), 1e-10))
    logs = np.maximum(logs, logs.max(initial=-10.0) - 8.0)
    return ((logs + 4.0) / 4.0).astype(np.float32)
