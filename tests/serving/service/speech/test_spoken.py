"""Real speech through real weights, against transformers in float32: 30 sentences that espeak-ng spoke
(`scripts/bench_speech.py make`), and a recording longer than a minute made of them; and how many words are heard wrong."""

import asyncio
import contextlib
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
EXACT = {"dtype": "float32", "quantization": "none"}
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


@contextlib.contextmanager
def heard_by(**how):
    """(sound files, what is wanted of them) -> transcripts, of all at once."""
    started = start(EngineConfig(model=str(WHISPER), max_num_seqs=4, progress=False, **how))
    service = started.service()
    try:
        yield lambda files, **wanted: asyncio.run(bench_speech.heard(service, files, len(files), **wanted))
        started.engine.runner.guard.check()
    finally:
        started.shutdown()


@pytest.fixture(scope="module")
def ask():
    with heard_by(**EXACT) as ask:
        yield ask


def tokens(oracle, transcript) -> list[int]:
    return oracle.said(token for segment in transcript.segments for token in segment.tokens)


def words_wrong(found) -> float:
    said = json.loads((SPOKEN / "said.json").read_text())
    assert len(found) == len(said) == 30
    return bench_speech.error_rate(said, [one.text for one in found])


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("part", range(3))  # each ends within minutes on a machine that others use, too
def test_sentences_have_the_tokens_of_transformers(ask, oracle, files, part, timed):
    own = files[part::3]
    for data, transcript in zip(own, ask(own, segments=timed), strict=True):
        assert tokens(oracle, transcript) == oracle.tokens(read_sound(data, 60.0, "file"), timed)


def test_a_recording_longer_than_a_minute_has_the_tokens_of_transformers(ask, oracle, files):
    sound = bench_speech.joined([read_sound(data, 60.0, "file") for data in files], 65.0)
    (transcript,) = ask([wav(sound)], segments=True, doubts=Doubts(None, None, None))
    assert tokens(oracle, transcript) == oracle.tokens(sound, True)
    assert len({segment.seek for segment in transcript.segments}) > 2


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_few_words_are_heard_wrong(files, kind, timed, capsys):
    with heard_by(**{"float32": EXACT, "int8": {}}[kind]) as ask:
        rate = words_wrong(ask(files, segments=timed))
    with capsys.disabled():
        print(f"\n{kind}, times {timed}: {rate:.1%} of the words are wrong")
    assert rate < 0.1
