"""How Gemma 3n and Gemma 4 hear: half a minute of each sound, as transformers' feature extractors and processors have it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.media.processors.base import Fixed, Patched
from serving.media.sound import RATE
from serving.media.sound.frames import LogMel

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
