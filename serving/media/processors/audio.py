"""How sounds become what an encoder reads and how many tokens stand for them: as transformers' processors do it for Qwen2-Audio,
Audio Flamingo 3 and Voxtral, and Ultravox's own. The numbers come from the checkpoint's preprocessor_config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from serving.media.processors.base import Fixed, Patched, Sound
from serving.media.sound import RATE
from serving.media.sound.spectrum import FFT, HOP, log_mel

SOUND, SILENCE = 1, 2
"""As in `models.encoders.audio.chats`, of a frame."""
PLACE = 2**31 - 1
"""Stands in token ids where a sound is that no token of the vocabulary stands for."""
MARK = "\ufdd3"
"""And this in texts: a character that is for programs alone (Unicode Standard, 23.7)."""
BEYOND = 2
"""Frames behind the sound that its last row still sees, through two convolutions."""


@dataclasses.dataclass(frozen=True)
class Sounds:
    """How one checkpoint hears.

    Attributes:
        placeholder: the token that the chat template writes for a sound; `PLACE` where there is none.
        token: what stands in the prompt's places for it.
        window: frames that its encoder reads at once.
        mels: numbers of a frame.
        stack: of the encoder's rows, each of two frames, those that become one embedding.
        mean: by their mean, of rows that are all of sound; else side by side, the last with what is behind it.
        cut: windows that are read of a sound; None for all.
        whole: sounds are silence up to a whole window, which is heard like they are.
        once: a spectrogram is one sound's, not one window's: what is loudest in it decides what is silent.
        cut_s: seconds that are read of a sound; None for all.
    """

    placeholder: int
    token: int
    window: int
    mels: int
    stack: int
    mean: bool = False
    cut: int | None = None
    whole: bool = False
    once: bool = False
    cut_s: float | None = None

    @property
    def mark(self) -> str:
        """What stands in texts for a sound; "" where that is the placeholder, and stays."""
        return MARK if self.wordless else ""

    @property
    def wordless(self) -> bool:
        """See `Sound`."""
        return self.placeholder == PLACE

    @property
    def _per(self) -> int:
        """Frames of an embedding."""
        return 2 * self.stack

    def most_seconds(self, tokens: int) -> float:
        """Of sounds that have no more embeddings than that."""
        if self.cut is not None or self.cut_s is not None:
            return float("inf")  # what is longer is cut
        windows, left = divmod(tokens, -(-self.window // self._per))
        frames = windows * self.window + (0 if self.whole else left * self._per)
        return frames * HOP / RATE

    @property
    def enough_s(self) -> float:
        """Of a sound that are read."""
        windows = math.inf if self.cut is None else self.cut * self.window * HOP / RATE
        return min(windows, math.inf if self.cut_s is None else self.cut_s)

    def pieces(self, samples: np.ndarray) -> list[Patched]:
        """A sound at `RATE`, of at least one sample, as the encoder reads it: a piece a window."""
        window = self.window * HOP
        if self.cut is not None:
            samples = samples[: self.cut * window]
        if self.cut_s is not None:
            samples = samples[: int(self.cut_s * RATE)]
        if self.once:
            found = self._of_one_spectrogram(samples)
        else:
            found = [self._masked(samples[at : at + window]) for at in range(0, len(samples), window)]
        return [dataclasses.replace(piece, joins=at > 0) for at, piece in enumerate(found)]

    def _of_one_spectrogram(self, samples: np.ndarray) -> list[Patched]:
        if self.mean:
            real = -(-len(samples) // HOP)  # what rings behind it counts for what is loudest
            logs, found = log_mel(np.pad(samples, (0, 4 * FFT)), self.mels)[:real], []
            for at in range(0, real, self.window):
                frames = logs[at : at + self.window]
                found.append(_piece(frames, np.full(len(frames), SOUND), ((len(frames) - 1) // 2 + 1) // self.stack))
            return found
        size = self.window * HOP if self.whole else HOP
        length = max(-(-len(samples) // size) * size, 0 if self.whole else 2 * HOP)
        logs = log_mel(np.pad(samples, (0, length - len(samples))), self.mels)
        found = []
        for at in range(0, len(logs), self.window):
            frames = logs[at : at + self.window]
            count, kinds = -(-len(frames) // self._per), np.full(len(frames), SOUND)
            if at and len(frames) < self.window:  # what is behind a long sound's end is heard as silence
                more = min(count * self._per + BEYOND, self.window) - len(frames)
                frames = np.pad(frames, ((0, more), (0, 0)))
                kinds = np.concatenate([kinds, np.full(more, SILENCE)])
            found.append(_piece(frames, kinds, count))
        return found

    def _masked(self, samples: np.ndarray) -> Patched:
        """Silence up to a window's end, of which rows see the beginning alone."""
        real, logs = -(-len(samples) // HOP), log_mel(np.pad(samples, (0, self.window * HOP - len(samples))), self.mels)
        frames = logs[: real + BEYOND]
        kinds = np.where(np.arange(len(frames)) < real, SOUND, SILENCE)
        return _piece(frames, kinds, ((real - 1) // 2 + 1) // self.stack)


def _piece(frames: np.ndarray, kinds: np.ndarray, count: int) -> Patched:
    place = np.stack([np.arange(len(frames)), kinds], axis=-1).astype(np.int32)
    return Patched(np.ascontiguousarray(frames, np.float32), place, count, 1, (count,))


@dataclasses.dataclass(frozen=True)
class Hearing(Fixed):
    """A processor of sounds alone. Attributes as in `Processor`."""

    sound: Sound | None = None
    images: bool = False
    placeholder: int = PLACE
    mark: str = ""
    three_numbers: bool = False
    together: bool = False

    def identity(self) -> str:
        return repr(self)


@dataclasses.dataclass(frozen=True)
class AudioProcessor(Hearing):
    """Attributes as in `Processor`."""

    @classmethod
    def qwen2(cls, hf: Mapping[str, Any]) -> AudioProcessor:
        """Qwen2-Audio: the first window of each sound."""
        token = int(hf.get("audio_token_index") or hf.get("audio_token_id") or 151646)
        return cls(_sounds(hf, token, token, 2, mean=True, cut=1))

    @classmethod
    def omni(cls, hf: Mapping[str, Any]) -> AudioProcessor:
        """Qwen2.5-Omni: five minutes of each sound; its encoder hears two seconds at a time, of which many are read at once."""
        token, said = (
            int(hf.get("audio_token_index") or hf.get("audio_token_id") or 151646),
            hf.get("preprocessor") or {},
        )
        seconds = float(said.get("chunk_length") or 300)
        own = {**(hf.get("audio_config") or {}), "max_source_positions": 1500}
        plain = {**hf, "audio_config": own, "preprocessor": {k: v for k, v in said.items() if k != "chunk_length"}}
        sounds = _sounds(plain, token, token, 2, mean=True, once=True)
        return cls(dataclasses.replace(sounds, cut_s=seconds))

    @classmethod
    def flamingo3(cls, hf: Mapping[str, Any]) -> AudioProcessor:
        """Audio Flamingo 3: ten minutes of each sound, window by window."""
        token, window = int(hf.get("audio_token_id") or 151669), _window(hf) * HOP / RATE
        seconds = float((hf.get("preprocessor") or {}).get("max_audio_len") or 600)
        return cls(_sounds(hf, token, token, 2, mean=True, cut=max(1, int(seconds // window))))

    @classmethod
    def voxtral(cls, hf: Mapping[str, Any]) -> AudioProcessor:
        """Voxtral: whole windows."""
        token, said = int(hf.get("audio_token_id") or 24), hf.get("audio_config") or {}
        stack = (said.get("intermediate_size") or 5120) // (said.get("hidden_size") or 1280)
        return cls(_sounds(hf, token, token, stack, whole=True, once=True))

    @classmethod
    def ultravox(cls, hf: Mapping[str, Any]) -> AudioProcessor:
        """Ultravox, whose chat templates know nothing of sounds."""
        ends = hf.get("eos_token_id")
        end = ends[-1] if isinstance(ends, list) else ends
        token = int(hf.get("audio_token_index") or end or 0)
        return cls(_sounds(hf, PLACE, token, int(hf.get("stack_factor", 8)), once=True))


def _sounds(hf: Mapping[str, Any], placeholder: int, token: int, stack: int, **more: Any) -> Sounds:
    """Raises ValueError, in a sentence, for spectrograms that are not made here."""
    said, window = hf.get("preprocessor") or {}, _window(hf)
    mels = int((hf.get("audio_config") or {}).get("num_mel_bins") or 128)
    for name, wanted in (("sampling_rate", RATE), ("hop_length", HOP), ("n_fft", FFT), ("feature_size", mels)):
        if (found := said.get(name, wanted)) != wanted:
            raise ValueError(f"preprocessor_config.json: {name} is {found}; {wanted} is read with this encoder.")
    if said.get("dither") or said.get("do_normalize"):
        raise ValueError("preprocessor_config.json: sounds with dither or do_normalize are not read.")
    if (seconds := said.get("chunk_length", window * HOP / RATE)) * RATE != window * HOP:
        raise ValueError(
            f"preprocessor_config.json: chunk_length is {seconds}; the encoder hears {window * HOP / RATE:g} s."
        )
    return Sounds(placeholder, token, window, mels, stack, **more)


def _window(hf: Mapping[str, Any]) -> int:
    """Frames that the encoder reads at once."""
    return 2 * int((hf.get("audio_config") or {}).get("max_source_positions") or 1500)
