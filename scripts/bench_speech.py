"""Speech to text beside faster-whisper and transformers, on sentences that espeak-ng speaks.

python scripts/bench_speech.py make FOLDER                    30 sentences as small FLACs, and what is said in them
python scripts/bench_speech.py check FOLDER MODEL             tokens against transformers' in float32, word error rate
python scripts/bench_speech.py time FOLDER MODEL --streams 8  seconds of sound a second, this engine
python scripts/bench_speech.py peer FOLDER MODEL --streams 8  the same of faster-whisper (int8), from an environment that has it
python scripts/bench_speech.py long FOLDER MODEL --streams 32 --minutes 60    long recordings at once: time, and memory as it goes

With --timed, `time` and `peer` ask for the times of segments, too.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import math
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

RATE = 16_000

STARTS = (
    "The old captain",
    "My neighbour's daughter",
    "A group of students",
    "The new director",
    "Every morning the baker",
)
MIDDLES = ("walked slowly to", "wrote a long letter about", "wanted to know more about", "took several photographs of",
           "told us a story about", "had never heard of")  # fmt: skip
ENDS = ("the harbour before the storm arrived.", "the small museum behind the station.", "the bridge across the river.")


def sentences() -> list[str]:
    """30 of them."""
    return [
        f"{start} {middle} {ENDS[(i + j) % 3]}" for i, start in enumerate(STARTS) for j, middle in enumerate(MIDDLES)
    ]


def make(folder: pathlib.Path) -> None:
    """Speaks the sentences, 16 kHz and one channel."""
    import soundfile

    from serving.media.sound import read_sound

    folder.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(sentences()):
        spoken = subprocess.run(
            ["espeak-ng", "-v", "en-us", "-s", "150", "--stdout", text], capture_output=True, check=True
        )
        samples = np.round(read_sound(spoken.stdout, 60.0, "espeak-ng") * 512) / 512  # 10 bits: half the file's size
        soundfile.write(folder / f"{i:02}.flac", samples, RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
    (folder / "said.json").write_text(json.dumps(sentences()))


def words(text: str) -> list[str]:
    """Without marks and capitals, in one spelling."""
    plain = "".join(c.lower() if c.isalnum() or c in " '" else " " for c in text)
    return plain.replace("harbour", "harbor").replace("neighbour", "neighbor").split()


def wrong(said: list[str], heard: list[str]) -> int:
    """Words that are missing, added or others (Levenshtein)."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


def error_rate(said: Sequence[str], heard: Sequence[str]) -> float:
    """Wrong words of all that were said."""
    errors = sum(wrong(words(one), words(other)) for one, other in zip(said, heard, strict=True))
    return errors / sum(len(words(one)) for one in said)


def started(model: str, streams: int, exact: bool) -> Any:
    """The engine, in a process that keeps freed memory, as a server's does."""
    from serving import memory
    from serving.boot.startup import start
    from serving.engine.api.config import EngineConfig

    memory.keep_freed()
    kind: dict[str, Any] = {"dtype": "float32", "quantization": "none"} if exact else {}
    return start(EngineConfig(model=model, max_num_seqs=max(4, streams), progress=False, **kind))


def joined(sounds: Sequence[np.ndarray], seconds: float, pause: float = 0.4) -> np.ndarray:
    """Sentences with pauses between them, until they are so long."""
    pieces: list[np.ndarray] = []
    for sound in sounds:
        pieces += [sound, np.zeros(int(pause * RATE), np.float32)]
        if sum(map(len, pieces)) >= seconds * RATE:
            break
    return np.concatenate(pieces)


class Oracle:
    """transformers' Whisper in float32."""

    def __init__(self, model: str) -> None:
        import torch
        import transformers

        self._model = transformers.WhisperForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
        self._read = transformers.WhisperFeatureExtractor.from_pretrained(model)
        self.end = self._model.generation_config.eos_token_id
        self.times = self._model.generation_config.no_timestamps_token_id + 1

    def said(self, tokens: Iterable[int]) -> list[int]:
        """Words and times."""
        return [token for token in tokens if token < self.end or token >= self.times]

    def tokens(self, sound: np.ndarray, timed: bool) -> list[int]:
        """What it hears in English speech."""
        import torch

        long = len(sound) > 30 * RATE
        how: dict[str, Any] = {"truncation": False, "padding": "longest"} if long else {}
        read = self._read(sound, sampling_rate=RATE, return_tensors="pt", return_attention_mask=True, **how)
        with torch.no_grad():
            out = self._model.generate(
                read["input_features"], attention_mask=read["attention_mask"], language="en", task="transcribe",
                return_timestamps=timed, return_segments=long,
            )  # fmt: skip
        found = [token for one in out["segments"][0] for token in one["tokens"]] if long else out[0]
        return self.said(map(int, found))


async def heard(service: Any, files: list[bytes], streams: int, **how: Any) -> list[Any]:
    """Transcripts, so many at once."""
    from serving.service.speech.transcribe import TranscribeInput, transcribe

    room = asyncio.Semaphore(streams)

    async def one(data: bytes) -> Any:
        async with room:
            return await transcribe(service, TranscribeInput(data, language="en", **how))

    return await asyncio.gather(*map(one, files))


def check(folder: pathlib.Path, model: str) -> None:
    """Prints how many files have transformers' tokens, with and without times, and the word error rate."""
    from serving.media.sound import read_sound

    files = [path.read_bytes() for path in sorted(folder.glob("*.flac"))]
    said = json.loads((folder / "said.json").read_text())
    engine, oracle = started(model, 4, True), Oracle(model)
    for timed in (False, True):
        found = asyncio.run(heard(engine.service(), files, 4, segments=timed))
        same = 0
        for data, transcript in zip(files, found, strict=True):
            tokens = oracle.said(token for segment in transcript.segments for token in segment.tokens)
            same += tokens == oracle.tokens(read_sound(data, 60.0, "file"), timed)
        rate = error_rate(said, [one.text for one in found])
        print(f"times {timed}: {same} of {len(files)} as transformers; word error rate {rate:.3f}", flush=True)
    engine.shutdown()


def seconds_of(folder: pathlib.Path) -> float:
    import soundfile

    return sum(soundfile.info(path).duration for path in sorted(folder.glob("*.flac")))


def timed(folder: pathlib.Path, model: str, streams: int, times: bool) -> None:
    """Prints the real-time factor of this engine."""
    files = [path.read_bytes() for path in sorted(folder.glob("*.flac"))]
    engine = started(model, streams, False)
    asyncio.run(heard(engine.service(), files[:2], streams, segments=times))
    began = time.monotonic()
    asyncio.run(heard(engine.service(), files, streams, segments=times))
    print(f"{streams} streams: {seconds_of(folder) / (time.monotonic() - began):.2f} s of sound a second")
    engine.shutdown()


def peer(folder: pathlib.Path, size: str, streams: int, times: bool) -> None:
    """Prints the real-time factor of faster-whisper, int8. Needs it and no more of this project than this file."""
    from faster_whisper import WhisperModel  # type: ignore[import-not-found]

    model = WhisperModel(size, device="cpu", compute_type="int8", num_workers=streams)

    def one(path: pathlib.Path) -> str:
        found = model.transcribe(str(path), language="en", beam_size=1, without_timestamps=not times)[0]
        return "".join(segment.text for segment in found)

    files = sorted(folder.glob("*.flac"))
    one(files[0])
    began = time.monotonic()
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(one, files))
    print(
        f"faster-whisper, {streams} streams: {seconds_of(folder) / (time.monotonic() - began):.2f} s of sound a second"
    )


def recording(sentences: Sequence[np.ndarray], seconds: float, first: int) -> bytes:
    """A FLAC of so many seconds of sentences, beginning with one of them."""
    import soundfile

    turned, out = [*sentences[first:], *sentences[:first]], io.BytesIO()
    once = joined(turned, float("inf"))
    with soundfile.SoundFile(out, "w", RATE, 1, "PCM_16", format="FLAC") as file:
        for _ in range(math.ceil(seconds * RATE / len(once))):
            file.write(once)
    return out.getvalue()


def resident() -> int:
    """MiB of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 2**20


def long(folder: pathlib.Path, model: str, streams: int, minutes: float) -> None:
    """Prints how long so many recordings take at once, and this process's memory every ten seconds of it."""
    from serving.media.sound import read_sound

    sentences = [read_sound(path.read_bytes(), 60.0, "file") for path in sorted(folder.glob("*.flac"))]
    files = [recording(sentences, 60 * minutes, i % len(sentences)) for i in range(streams)]
    engine = started(model, 8, False)

    async def watched() -> list[Any]:
        async def watch() -> None:
            while True:
                print(f"{time.monotonic() - began:.0f} s: {resident()} MiB", flush=True)
                await asyncio.sleep(10)

        watching, began = asyncio.ensure_future(watch()), time.monotonic()
        try:
            return await heard(engine.service(), files, streams)
        finally:
            watching.cancel()

    asyncio.run(heard(engine.service(), [recording(sentences, 5, 0)], 1))
    began = time.monotonic()
    found = asyncio.run(watched())
    seconds, sound = time.monotonic() - began, sum(one.duration for one in found)
    print(f"{streams} recordings of {minutes:g} minutes: {seconds:.0f} s, {sound / seconds:.2f} s of sound a second")
    engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("make", "check", "time", "peer", "long"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("model", nargs="?", default="")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--timed", action="store_true")
    parser.add_argument("--minutes", type=float, default=60.0)
    args = parser.parse_args()
    match args.what:
        case "make":
            make(args.folder)
        case "check":
            check(args.folder, args.model)
        case "time":
            timed(args.folder, args.model, args.streams, args.timed)
        case "long":
            long(args.folder, args.model, args.streams, args.minutes)
        case "peer":
            peer(args.folder, args.model, args.streams, args.timed)


if __name__ == "__main__":
    main()
