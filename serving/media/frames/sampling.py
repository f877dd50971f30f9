"""Which frames of a video are read, as transformers' video processors choose them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

USUAL_FPS = 24.0
"""Of frames of which nobody says when they were."""
UNSAMPLED = 32
"""Frames of a file that are read at most where its processor leaves the choice to whoever opens files."""


@dataclasses.dataclass(frozen=True)
class Frames:
    """The frames that are read.

    Attributes:
        indices: of them among all of the video's.
        total: frames of the video.
        fps: of the video; None where nobody says.
    """

    indices: tuple[int, ...]
    total: int
    fps: float | None = None

    @property
    def sampled_fps(self) -> float:
        """Frames a second that are read."""
        return USUAL_FPS if self.fps is None else len(self.indices) / self.total * self.fps


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How frames are chosen.

    Attributes:
        rule: of a family: "even" (transformers' own), "there" (as even, and all where there are fewer than asked for), "qwen2",
            "qwen3", "glm" or "glm46".
        sample: whether they are at all; else all are read that are given one by one, and of files `UNSAMPLED`, evenly.
        fps, frames: how many, in a second or of all; at most one of them counts.
        least, most: bounds for what `fps` says.
        together: frames that are cut together; their number is rounded to whole ones of these.
        longest: seconds of a video that `fps` is for; of longer ones as many frames are read as of this long ones.
    """

    rule: str = "even"
    sample: bool = False
    fps: float | None = None
    frames: int | None = None
    least: int = 4
    most: int = 768
    together: int = 1
    longest: float = 300.0

    @classmethod
    def of(
        cls, said: Mapping[str, Any], rule: str, sample: bool, fps: float | None = None, together: int = 1
    ) -> Sampling:
        """As a video processor's file says; the others are its class's defaults."""
        given = {name: said[name] for name in ("do_sample_frames", "fps", "num_frames") if said.get(name) is not None}
        made = cls(
            rule, sample, fps, None, int(said.get("min_frames") or 4), int(said.get("max_frames") or 768), together
        )
        return made.asked({"do_sample_frames": sample, **given})

    def asked(self, said: Mapping[str, Any]) -> Sampling:
        """The same as a request wants it: `fps`, `num_frames`, `do_sample_frames`. ValueError, in a sentence, for what is none."""
        if unknown := sorted(said.keys() - {"fps", "num_frames", "do_sample_frames"}):
            raise ValueError(f"{unknown[0][:40]!r} cannot be changed for this model's videos.")
        fps, frames, sample = said.get("fps"), said.get("num_frames"), said.get("do_sample_frames")
        if fps is not None and (isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= 1000):
            raise ValueError(f"fps must be a number above 0 and at most 1000, got {fps!r}.")
        if frames is not None and (
            isinstance(frames, bool) or not isinstance(frames, int) or not 1 <= frames <= 100_000
        ):
            raise ValueError(f"num_frames must be a whole number from 1, got {frames!r}.")
        if sample is not None and not isinstance(sample, bool):
            raise ValueError(f"do_sample_frames must be true or false, got {sample!r}.")
        if fps is not None and frames is not None:
            raise ValueError("fps and num_frames exclude each other: give one of them.")
        if fps is None and frames is None:
            return dataclasses.replace(self, sample=self.sample if sample is None else sample)
        return dataclasses.replace(self, fps=fps, frames=frames, sample=sample is not False)

    def chosen(self, total: int, fps: float | None, file: bool) -> Frames:
        """The frames to read of `total`.

        Args:
            fps: of the video; None where nobody says.
            file: whether they come out of a file, of which nobody has chosen any.
        Raises:
            ValueError: there are fewer than asked for, in a sentence.
        """
        if self.sample:
            if self.rule.startswith("glm"):
                indices = self._glm(total, fps or USUAL_FPS, file)
            elif self.rule == "there" and self.frames is not None:
                indices = dataclasses.replace(self, frames=min(self.frames, total))._even(total, fps)
            else:
                rules = {"even": self._even, "there": self._even, "qwen2": self._qwen2, "qwen3": self._qwen3}
                indices = rules[self.rule](total, fps)
        elif file and total > UNSAMPLED:
            indices = np.linspace(0, total - 1, UNSAMPLED).astype(int)
        else:
            indices = np.arange(total)
        return Frames(tuple(indices.tolist()), total, fps)

    def _even(self, total: int, fps: float | None) -> np.ndarray:
        wanted = self.frames
        if wanted is None and self.fps is not None:
            wanted = max(1, int(total / (fps or USUAL_FPS) * self.fps))
        if wanted is None:
            return np.arange(total)
        return np.arange(_there(wanted, total)) * total // wanted

    def _qwen2(self, total: int, fps: float | None) -> np.ndarray:
        step = self.together
        if self.frames is not None:
            wanted = round(self.frames / step) * step
        elif self.fps is not None:
            most = math.floor(min(self.most, total) / step) * step
            wanted = math.floor(min(max(total / (fps or USUAL_FPS) * self.fps, self.least), most, total) / step) * step
        else:
            return np.arange(total)
        if wanted < 1:
            return np.arange(total)
        # transformers steps in float32, and so may we: a step of 1/3 of a frame more is another frame
        return np.arange(0, total, total / _there(wanted, total)).astype(np.float32).astype(int)

    def _qwen3(self, total: int, fps: float | None) -> np.ndarray:
        if self.frames is not None:
            wanted = self.frames
        elif self.fps is not None:
            wanted = min(max(int(total / (fps or USUAL_FPS) * self.fps), self.least), self.most, total)
        else:
            wanted = min(max(total, self.least), self.most)
        return np.linspace(0, total - 1, wanted).round().astype(int)

    def _glm(self, total: int, fps: float, file: bool) -> np.ndarray:
        """An even number, the last one twice where it would be odd."""
        last = total - 1
        lasts = total / fps if file else round(last / fps) + 1  # seconds, as transformers has them
        if self.frames is not None:
            indices = self._even(total, fps).tolist()
        elif self.rule == "glm46":
            indices = _glm46(total, fps, lasts, self.together)
        elif lasts <= self.longest:
            per_second = self.fps or 2.0
            count = max(math.floor(lasts * per_second), 1)
            indices = [min(last, math.ceil(i * fps / per_second)) for i in range(count)]
        else:
            count = int(self.longest * (self.fps or 2.0))
            seconds = np.linspace(0, lasts, count, endpoint=True)
            indices = range(total) if count >= total else [min(last, math.ceil(at * fps)) for at in seconds]
        once = list(dict.fromkeys(indices))
        return np.array(once + once[-1:] * (len(once) % 2))


GLM46 = ((30, 3.0), (300, 1.0), (2400, 0.5))
"""GLM-4.6V reads of videos up to so many seconds so many pairs of frames a second; 640 frames at most."""


def _glm46(total: int, fps: float, lasts: float, together: int) -> list[int]:
    short = min(lasts, GLM46[-1][0])
    rate = next(rate for bound, rate in GLM46 if short <= bound) * together
    wanted = max(1, min(int(short * rate), 640))
    if total < wanted:
        return np.linspace(0, total - 1, wanted, dtype=int).tolist()
    found, due = [], 0.0
    for index in range(total):
        if index * (1 / fps) >= due:
            due += 1 / rate
            found.append(index)
            if due >= int(lasts):
                break
    if len(found) == wanted:
        return found
    first, last = (found[0], found[-1]) if len(found) < wanted else (0, total - 1)
    return np.linspace(first, last, wanted, dtype=int).tolist()


def _there(wanted: int, total: int) -> int:
    if wanted > total:
        raise ValueError(f"{wanted} frames are asked for, and the video has {total}.")
    return wanted
