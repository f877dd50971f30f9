"""How Granite Speech hears: the whole of a sound as one log-mel spectrogram, of whose frames two are read together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.media.processors.audio import MARK, PLACE
from serving.media.processors.base import Fixed, Patched
from serving.media.sound import RATE
from serving.media.sound.frames import mel_bands

SOUND = 1
LONGEST_S = 300.0
"""Seconds that are heard; transformers hears whatever there is, in memory that grows with it."""
DEFAULTS = {"sampling_rate": RATE, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
BLOCK = 1024
"""Frames that are transformed at once."""


@dataclasses.dataclass(frozen=True)
class GraniteSounds:
    """Attributes as in `Sound`, and:

    Attributes:
        fft, length, hop, mels: of the transform; of its window and from one to the next, in samples; bands.
        window, rate: rows (of two frames) that become embeddings together, and how many of them become one.
    """

    placeholder: int
    token: int
    fft: int
    length: int
    hop: int
    mels: int
    window: int
    rate: int
    mark: str = MARK
    wordless: bool = True
    enough_s: float = math.inf

    def most_seconds(self, tokens: int) -> float:
        """Of sounds that have no more embeddings than that."""
        rows = tokens // (self.window // self.rate) * self.window
        return min(LONGEST_S, 2 * rows * self.hop / RATE)

    def pieces(self, samples: np.ndarray) -> list[Patched]:
        """The one piece of a sound at `RATE`."""
        logs = self.log_mel(samples)
        frames = logs[: len(logs) // 2 * 2].reshape(-1, 2 * self.mels)
        count = -(-len(frames) // self.window) * (self.window // self.rate)
        place = np.stack([np.arange(len(frames)), np.full(len(frames), SOUND)], axis=-1).astype(np.int32)
        return [Patched(np.ascontiguousarray(frames), place, count, 1, (count,))]

    def log_mel(self, samples: np.ndarray) -> np.ndarray:
        """float32 [len(samples) / hop + 1, mels]: frames are centred, edges mirrored; 80 dB below the loudest is silence."""
        half, count = self.fft // 2, len(samples) // self.hop + 1
        samples = np.pad(samples.astype(np.float64), (0, max(0, half + 1 - len(samples))))  # else it has no mirror
        samples = np.pad(samples, half, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(samples, self.fft)[:: self.hop][:count]
        hann, side = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.length) / self.length), (self.fft - self.length) // 2
        hann = np.pad(hann, (side, self.fft - self.length - side))
        bands = mel_bands(self.mels, self.fft, 0.0, RATE / 2)
        power = [np.abs(np.fft.rfft(windows[at : at + BLOCK] * hann, axis=1)) ** 2 for at in range(0, count, BLOCK)]
        logs = np.concatenate([np.log10(np.maximum(part @ bands, 1e-10)).astype(np.float32) for part in power])
        return np.maximum(logs, logs.max() - np.float32(8.0)) / np.float32(4.0) + np.float32(1.0)


@dataclasses.dataclass(frozen=True)
class GraniteProcessor(Fixed):
    """Attributes as in `Processor`."""

    sound: GraniteSounds | None = None
    images: bool = False
    placeholder: int = PLACE
    mark: str = ""
    three_numbers: bool = False
    together: bool = False

    def identity(self) -> str:
        return repr(self)

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> GraniteProcessor:
        """Raises ValueError, in a sentence, for spectrograms that are not made here."""
        said = hf.get("preprocessor") or {}
        own = DEFAULTS | {name: int(said[name]) for name in DEFAULTS if said.get(name) is not None}
        window, rate = int(hf.get("window_size") or 15), int(hf.get("downsample_rate") or 5)
        wanted = int((hf.get("encoder_config") or {}).get("input_dim") or 160)
        if own["sampling_rate"] != RATE or not 1 <= own["hop_length"] <= own["win_length"] <= own["n_fft"] <= RATE:
            raise ValueError(f"preprocessor_config.json: spectrograms of {own} are not made.")
        if 2 * own["n_mels"] != wanted:
            raise ValueError(
                f"preprocessor_config.json: n_mels is {own['n_mels']}; the encoder reads {wanted} numbers, of two frames."
            )
        for name, value in (("projector_window_size", window), ("projector_downsample_rate", rate)):
            if (found := said.get(name, value)) != value:
                raise ValueError(f"preprocessor_config.json: {name} is {found}; config.json says {value}.")
        token = int(hf.get("audio_token_index") or hf.get("audio_token_id") or 49155)
        sound = GraniteSounds(
            PLACE, token, own["n_fft"], own["win_length"], own["hop_length"], own["n_mels"], window, rate
        )
        return cls(sound)
