"""Real speech through real weights, against transformers in float32: 30 sentences that espeak-ng spoke
(`scripts/bench_speech.py make`), and a recording longer than a minute made of them."""

import asyncio
import json
import os
import pathlib

import pytest

from scripts import bench_speech
from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from serving.media.sound import read_sound
from serving.service.speech.doubts import Doubts
from tests.models.tiny_whisper import wav

SPOKEN = pathlib.Path(__file__).parent / "spoken"
FOLDER = os.environ.get("JAXSERVE_TEST_MODELS")
WHISPER = pathlib.Path(FOLDER) / "whisper-base" if FOLDER else None

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real_model,
    pytest.mark.skipif(WHISPER is None or not WHISPER.exists(), reason="JAXSERVE_TEST_MODELS has no folder whisper-base"),
]  # fmt: skip


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    return [path.read_bytes() for path in sorted(SPOKEN.glob("*.flac"))]


@pytest.fixture(scope="module")
def oracle():
    return bench_speech.Oracle(str(WHISPER))


@pytest.fixture(scope="module")
def ask():
    """(sound files, what is wanted of them) -> transcripts, of all at once."""
    how = {"dtype": "float32", "quantization": "none", "max_num_seqs": 4, "progress": False}
    started = start(EngineConfig(model=str(WHISPER), **how))
    service = started.service()
    yield lambda files, **wanted: asyncio.run(bench_speech.heard(service, files, len(files), **wanted))
    started.engine.runner.guard.check()
    started.shutdown()


def tokens(oracle, transcript) -> list[int]:
    return oracle.said(token for segment in transcript.segments for token in segment.tokens)


@pytest.mark.parametrize("timed", [False, True])
def test_sentences_have_the_tokens_of_transformers(ask, oracle, files, timed):
    found = ask(files, segments=timed)
    said = json.loads((SPOKEN / "said.json").read_text())
    assert len(found) == len(said) == 30
    for data, transcript in zip(files, found, strict=True):
        assert tokens(oracle, transcript) == oracle.tokens(read_sound(data, 60.0, "file"), timed)
    assert bench_speech.error_rate(said, [one.text for one in found]) < 0.1


def test_a_recording_longer_than_a_minute_has_the_tokens_of_transformers(ask, oracle, files):
    sound = bench_speech.joined([read_sound(data, 60.0, "file") for data in files], 65.0)
    (transcript,) = ask([wav(sound)], segments=True, doubts=Doubts(None, None, None))
    assert tokens(oracle, transcript) == oracle.tokens(sound, True)
    assert len({segment.seek for segment in transcript.segments}) > 2
