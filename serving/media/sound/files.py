"""Sound files to samples at the rate that models hear. Files are read, and their rate changed, piece by piece: what is small as a
file may be hours of silence."""

from __future__ import annotations

import importlib.util
import io
import math
import re
import time
from collections.abc import Iterator

import numpy as np

from serving.errors import ErrorKind, RequestError, invalid

RATE = 16_000
FORMATS = ("WAV", "FLAC", "OGG", "MP3", "WAVEX", "AIFF")
BEGINNINGS = (b"RIFF....WAVE", b"RIFX....WAVE", b"FORM....AIF[FC]", b"fLaC", b"OggS", b"\xff[\xe0-\xff]")
"""Of their files, as patterns. What begins otherwise is not opened: the library reads twenty more formats, whose parsers have had
holes, and would tell only afterwards which it was."""
MAX_CHANNELS = 8
ZEROS = 24
"""Zero crossings of the resampling filter on each side."""
RATES = (1000, 384_000)
"""The least and the most samples a second that are read."""
PIECE = 1 << 20
"""Samples of all channels that are read at once."""
READ_S = 120.0
"""Seconds of a processor that reading one file may take."""


def read_sound(
    data: bytes, max_seconds: float, place: str, read_s: float = READ_S, enough_s: float = math.inf
) -> np.ndarray:
    """A file's sound as float32 samples at `RATE`, its channels averaged. Blocks.

    Args:
        place: the field that has it, for errors.
        enough_s: seconds of sound behind which nothing is wanted.
        read_s: seconds of a processor that it may take, however many files take turns.
    Raises:
        RequestError: INVALID_ARGUMENT, in the same words whatever is wrong inside; longer than `max_seconds`.
    """
    found, samples = [np.zeros(0, np.float32)], 0
    for piece in sound_pieces(data, max_seconds, place, read_s):
        found.append(piece)
        samples += len(piece)
        if samples >= enough_s * RATE:
            break
    return np.concatenate(found)


def sound_pieces(data: bytes, max_seconds: float, place: str, read_s: float = READ_S) -> Iterator[np.ndarray]:
    """The same as it is read."""
    if importlib.util.find_spec("soundfile") is None:  # of a model that sees, and is served without it
        raise RequestError(
            ErrorKind.UNIMPLEMENTED,
            "This server reads no sound files: its operator can add that with pip install soundfile. Samples are read.",
        )
    import soundfile

    spent, resumed = 0.0, time.thread_time()
    if not _may_be_sound(data):
        raise _unreadable(place)
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate, channels = file.samplerate, file.channels
            if file.format not in FORMATS or not 1 <= channels <= MAX_CHANNELS or not RATES[0] <= rate <= RATES[1]:
                raise _unreadable(place)
            most, total = int(max_seconds * rate), 0  # of what is there, whatever the header says
            resampler = Resampler(rate)
            while len(piece := file.read(PIECE // channels, dtype="float32", always_2d=True)):
                total += len(piece)
                if total > most:
                    raise invalid(f"{place} is longer than {max_seconds:g} seconds.", place)
                if spent + time.thread_time() - resumed > read_s:
                    raise invalid(f"{place} took more than {read_s:g} seconds to read.", place)
                if not np.isfinite(mono := piece.mean(axis=1)).all():
                    raise _unreadable(place)
                made = resampler.push(mono)
                spent += time.thread_time() - resumed
                yield made
                resumed = time.thread_time()
            yield resampler.finish()
    except RequestError:
        raise
    except Exception:  # whatever a damaged file makes the library raise
        raise _unreadable(place) from None


def said_seconds(data: bytes) -> float:
    """How long a file says that it is, which need not be so; 0.0 of what is no sound."""
    import soundfile

    if not _may_be_sound(data):
        return 0.0
    try:
        return max(0.0, soundfile.info(io.BytesIO(data)).duration)
    except Exception:  # as above; reading it says what is wrong
        return 0.0


def _may_be_sound(data: bytes) -> bool:
    """By its first bytes, or those behind the tags (https://id3.org/id3v2.4.0-structure) in front of it."""
    at = 0
    while data[at : at + 3] == b"ID3":
        size = 0
        for byte in data[at + 6 : at + 10]:
            size = size << 7 | byte & 0x7F
        at += 10 + size
    return any(re.match(one, data[at : at + 12], re.DOTALL) for one in BEGINNINGS)


def _unreadable(place: str) -> RequestError:
    return invalid(f"{place} cannot be read as sound. WAV, FLAC, Ogg and MP3 are.", place)


class Resampler:
    """From some rate to `RATE`: a windowed sinc, one filter for each of the places between samples that are asked for."""

    def __init__(self, rate: int) -> None:
        common = math.gcd(rate, RATE)
        self._up, self._down = RATE // common, rate // common
        self._cutoff = min(1.0, self._up / self._down) * 0.95
        self._half = math.ceil(ZEROS / self._cutoff)
        self._plain = rate == RATE
        self._rest = np.zeros(self._half)  # input from `_first` on
        self._first, self._next = -self._half, 0  # `_next` is the output that comes next

    def push(self, samples: np.ndarray) -> np.ndarray:
        """float32 outputs for which enough input is there by now."""
        if self._plain:
            return samples.astype(np.float32)
        self._rest = np.concatenate([self._rest, samples.astype(np.float64)])
        there = self._first + len(self._rest) - self._half - 1  # inputs at which a filter may be centred
        return self._until(max(self._next, -(-there * self._up // self._down)))

    def finish(self) -> np.ndarray:
        """The last ones: behind the sound is silence."""
        if self._plain:
            return np.zeros(0, np.float32)
        count = -(-(self._first + len(self._rest)) * self._up // self._down)
        self._rest = np.concatenate([self._rest, np.zeros(self._half + 1)])
        return self._until(count)

    def _until(self, end: int) -> np.ndarray:
        """Outputs up to `end`; lets go of input that later ones do not need."""
        up, down, half, begin = self._up, self._down, self._half, self._next
        out = np.empty(end - begin)
        if len(out):
            windows = np.lib.stride_tricks.sliding_window_view(self._rest, 2 * half + 1)
            offsets = np.arange(-half, half + 1)
            for phase in range(min(up, len(out))):
                at = (begin + phase) * down
                first, part = at // up - half - self._first, (at % up) / up
                x = offsets - part
                taps = (
                    self._cutoff * np.sinc(self._cutoff * x) * np.cos(np.pi * np.clip(x / (half + 1), -1, 1) / 2) ** 2
                )
                here = len(range(phase, len(out), up))
                out[phase::up] = windows[first : first + here * down : down][:here] @ (taps / taps.sum())
        self._next = end
        keep = end * down // up - half - self._first
        self._rest, self._first = self._rest[keep:], self._first + keep
        return out.astype(np.float32)


def resampled(samples: np.ndarray, rate: int) -> np.ndarray:
    """A whole sound at `RATE`."""
    resampler = Resampler(rate)
    return np.concatenate([resampler.push(samples), resampler.finish()])
