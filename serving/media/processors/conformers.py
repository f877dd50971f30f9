"""What is heard by conformers, as transformers' feature extractors and processors have it: by Gemma 3n and Gemma 4 half a minute of
each sound; by Granite Speech the whole of it as one log-mel spectrogram, of whose frames two are read together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.media.processors.audio import MARK, PLACE, Hearing
from serving.media.processors.base import Fixed, Patched
from serving.media.sound import RATE
from serving.media.sound.frames import LogMel, mel_bands

LONGEST = 480_000
"""Samples that are heard of a sound: 30 s."""
WHOLE = 128
"""Samples that sounds are filled up to multiples of."""
LOUDEST = 1e6
"""What is louder than sound can be would be no number behind a transform in float32."""
SOUND = 1
GEMMA3N = {
    "feature_size": 128, "frame_length_ms": 32.0, "hop_length_ms": 10.0, "min_frequency": 125.0, "max_frequency": 7600.0,
    "preemphasis": 0.97, "preemphasis_htk_flavor": True, "fft_overdrive": True, "dither": 0.0, "input_scale_factor": 1.0,
    "mel_floor": 1e-5,
}  # fmt: skip
GEMMA4 = GEMMA3N | {
    "frame_length_ms": 20.0, "min_frequency": 0.0, "max_frequency": 8000.0, "preemphasis": 0.0, "fft_overdrive": False,
    "mel_floor": 1e-3,
}  # fmt: skip
GRANITE = {"sampling_rate": RATE, "n_fft": 512, "win_length": 400, "hop_length": 160, "n_mels": 80}
GRANITE_LONGEST_S = 300.0
"""Seconds that are heard; transformers hears whatever there is, in memory that grows with it."""
AT_ONCE = 1024
"""Frames that are transformed at once."""


@dataclasses.dataclass(frozen=True)
class GemmaSounds:
    """Attributes as in `Sound`, and:

    Attributes:
        mel: how frames become numbers.
        around: what is written on both sides of a sound's tokens.
        front: samples of silence before a sound.
        per: frames of an embedding.
        always: embeddings that each sound has; 0 where it depends on its length.
        longest: samples that are heard.
        wordless: as in `Sound`.
    """

    placeholder: int
    token: int
    mark: str
    mel: LogMel
    around: tuple[str, str]
    front: int
    per: int
    always: int
    longest: int = LONGEST
    wordless: bool = False

    @property
    def enough_s(self) -> float:
        """See `Sound`."""
        return self.longest / RATE

    def most_seconds(self, tokens: int) -> float:
        """Of sounds that have no more embeddings than that: what is longer is cut."""
        return float("inf")

    def pieces(self, samples: np.ndarray) -> list[Patched]:
        """The one piece of a sound at `RATE`."""
        samples = np.clip(samples[: self.longest].astype(np.float32), -LOUDEST, LOUDEST)
        if self.always:  # these have no frame without a whole one's samples; a sound is never without any
            samples = np.pad(samples, (0, max(0, self.mel.length + 1 - len(samples))))
        real, behind = len(samples), -len(samples) % WHOLE
        frames = self.mel.frames(np.pad(samples, (self.front, behind)))
        if not self.always:
            # What has a sample of silence in it does not count.
            frames = frames[: max(0, math.ceil((real + self.front - self.mel.length) / self.mel.hop))]
        count = self.always or -(-len(frames) // self.per)
        place = np.stack([np.arange(len(frames)), np.full(len(frames), SOUND)], axis=-1).astype(np.int32)
        return [Patched(frames, place, count, 1, (count,), f"{self.around[0]}{self.mark}{self.around[1]}")]


@dataclasses.dataclass(frozen=True)
class Gemma3nProcessor(Fixed):
    """Attributes as in `Processor`."""

    sound: GemmaSounds | None = None
    images: bool = False
    placeholder: int = 0
    mark: str = ""
    three_numbers: bool = False
    together: bool = False

    def identity(self) -> str:
        return repr(self)

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> Gemma3nProcessor:
        said, audio = hf.get("preprocessor") or {}, hf.get("audio_config") or {}
        token, always = int(hf.get("audio_token_id") or 262_273), int(hf.get("audio_soft_tokens_per_image") or 188)
        mel = LogMel.of(said, {**GEMMA3N, "feature_size": audio.get("input_feat_size") or 128}, added=False)
        per = 4 * int(audio.get("conf_reduction_factor") or 4)
        longest = min(LONGEST, ((always * per - 1) * mel.hop + mel.length + 1) // WHOLE * WHOLE)
        mark, around = "<audio_soft_token>", ("\n\n<start_of_audio>", "<end_of_audio>\n\n")
        return cls(GemmaSounds(token, token, mark, mel, around, 0, per, always, longest), placeholder=token)


def gemma4_sounds(hf: Mapping[str, Any]) -> GemmaSounds | None:
    """None where there is nothing to hear with: the larger sizes have no ears."""
    audio, said = hf.get("audio_config"), hf.get("sound_preprocessor") or {}
    if not isinstance(audio, Mapping):
        return None
    token = int(hf.get("audio_token_id") or 258_881)
    mels = int((audio.get("subsampling_conv_channels") or (128,))[0]) // 4 * 4
    mel = LogMel.of(said, {**GEMMA4, "feature_size": mels}, added=True)
    if mel.mels != mels:
        raise ValueError(f"preprocessor_config.json: feature_size is {mel.mels}; the encoder hears {mels} bands.")
    return GemmaSounds(token, token, "<|audio|>", mel, ("<|audio>", "<audio|>"), mel.length // 2, 4, 0)


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
        return min(GRANITE_LONGEST_S, 2 * rows * self.hop / RATE)

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
        power = [np.abs(np.fft.rfft(windows[at : at + AT_ONCE] * hann, axis=1)) ** 2 for at in range(0, count, AT_ONCE)]
        logs = np.concatenate([np.log10(np.maximum(part @ bands, 1e-10)).astype(np.float32) for part in power])
        return np.maximum(logs, logs.max() - np.float32(8.0)) / np.float32(4.0) + np.float32(1.0)


@dataclasses.dataclass(frozen=True)
class GraniteProcessor(Hearing):
    """Attributes as in `Processor`."""

    @classmethod
    def of(cls, hf: Mapping[str, Any]) -> GraniteProcessor:
        """Raises ValueError, in a sentence, for spectrograms that are not made here."""
        said = hf.get("preprocessor") or {}
        own = GRANITE | {name: int(said[name]) for name in GRANITE if said.get(name) is not None}
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
