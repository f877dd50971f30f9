"""Speech through a whole engine, against transformers on a tiny random Whisper: every token."""

import asyncio

import numpy as np
import pytest

from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from serving.errors import RequestError
from serving.media.sound.spectrum import log_mel
from serving.service import GenerateInput
from serving.service.speech.doubts import Doubts
from serving.service.speech.transcribe import TranscribeInput, transcribe
from tests.models import tiny_whisper
from tests.models.tiny_whisper import wav

NONE = Doubts(None, None, None)


class Speaking:
    """A model, its engine, and a way to ask it from tests."""

    def __init__(self, folder) -> None:
        self.model = tiny_whisper.save(folder)
        self.started = start(
            EngineConfig(
                model=str(folder), dtype="float32", quantization="none", max_num_seqs=3, max_num_batched_tokens=48,
                kv_cache_memory="1MiB", mm_encoder_cache_gb=0.0, progress=False,
            )
        )  # fmt: skip

    def ask(self, *given: TranscribeInput) -> list:
        async def run() -> list:
            service = self.started.service()
            return await asyncio.gather(*(transcribe(service, one) for one in given))

        return asyncio.run(run())


@pytest.fixture(scope="module")
def speaking(tmp_path_factory):
    made = Speaking(tmp_path_factory.mktemp("speech") / "model")
    yield made
    made.started.engine.runner.guard.check()
    made.started.shutdown()


def tokens(transcript) -> list[int]:
    """Words and times, as `tiny_whisper.expected` has them."""
    said = [token for segment in transcript.segments for token in segment.tokens]
    return [token for token in said if token < tiny_whisper.END or token >= tiny_whisper.TIMES]


def test_tokens_are_those_of_transformers_alone_and_in_company(speaking):
    sounds = [tiny_whisper.sound(seconds, seed) for seed, seconds in enumerate((2.0, 30.0))]
    given = [  # one of them is drawn again and again, in vain
        TranscribeInput(
            wav(sound), language="de" if i % 2 else "en", segments=timed, doubts=None if timed and i else NONE
        )
        for timed in (False, True)
        for i, sound in enumerate(sounds)
    ]
    found = speaking.ask(*given)
    for one, transcript, sound in zip(given, found, [*sounds, *sounds], strict=True):
        assert tokens(transcript) == tiny_whisper.expected(speaking.model, sound, one.segments, language=one.language)
        assert transcript.language == one.language and transcript.duration == pytest.approx(len(sound) / 16_000)
    speaking.started.engine.scheduler.kv.managers[0].media.check()


def test_a_long_sound_goes_on_where_its_last_segment_ended(speaking):
    sound = tiny_whisper.sound(71.0, 8)
    (transcript,) = speaking.ask(TranscribeInput(wav(sound), language="en", doubts=NONE))
    assert tokens(transcript) == tiny_whisper.expected(speaking.model, sound, True, language="en")
    assert len({segment.seek for segment in transcript.segments}) > 2


def test_words_have_the_times_of_transformers(speaking):
    import torch
    from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

    sound = tiny_whisper.sound(9.0, 4)
    (transcript,) = speaking.ask(TranscribeInput(wav(sound), language="en", words=True, segments=True, doubts=NONE))
    assert transcript.words and all(word.start <= word.end <= 60.0 for word in transcript.words)
    said = [token for segment in transcript.segments if segment.seek == 0 for token in segment.tokens]
    prompt = [tiny_whisper.START, tiny_whisper.EN, tiny_whisper.TRANSCRIBE]
    read = tiny_whisper.extractor()(sound, sampling_rate=16_000, return_tensors="pt")
    model = speaking.model
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(
            read["input_features"], decoder_input_ids=torch.tensor([prompt + said]), output_attentions=True, use_cache=False
        )  # fmt: skip
    heads = torch.stack(
        [found.cross_attentions[layer][0, head] for layer, head in tiny_whisper.GENERATION["alignment_heads"]]
    )
    weights = heads[:, len(prompt) :, :450]
    scaled = (weights - weights.mean(-2, keepdim=True)) / weights.std(-2, keepdim=True, unbiased=False)
    texts, times = _dynamic_time_warping(-_median_filter(scaled, 7).mean(0).double().numpy())
    wanted = times[np.pad(np.diff(texts), (1, 0), constant_values=1).astype(bool)] * 0.02
    padded = np.pad(sound, (0, 480_000 - len(sound)))
    ends = speaking.started.service().speech.align(log_mel(padded), prompt, said, 900)
    np.testing.assert_allclose(ends, wanted, atol=1e-6)


def test_the_language_is_found_out(speaking):
    import torch

    for seed in range(3):
        sound = tiny_whisper.sound(3.0, seed)
        (transcript,) = speaking.ask(TranscribeInput(wav(sound), doubts=NONE))
        read = tiny_whisper.extractor()(sound, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            wanted = int(speaking.model.detect_language(read["input_features"])[0])
        assert {"en": tiny_whisper.EN, "de": tiny_whisper.DE}[transcript.language] == wanted


def test_earlier_text_goes_in_front(speaking):
    import torch

    sound = tiny_whisper.sound(4.0)
    (transcript,) = speaking.ask(TranscribeInput(wav(sound), language="en", prompt="w7 w8 w9", doubts=NONE))
    prompt = torch.tensor([tiny_whisper.PREVIOUS, 7, 8, 9])
    wanted = tiny_whisper.expected(speaking.model, sound, False, language="en", prompt_ids=prompt)
    # Of the first window, whose room the prompt shares: how much later ones have differs where a model never ends.
    room = tiny_whisper.LENGTH - 8
    assert tokens(transcript)[:room] == wanted[:room] and len(tokens(transcript)) >= room


def test_what_is_refused(speaking):
    for given, words in (
        (TranscribeInput(b"nothing"), "cannot be read as sound"),
        (TranscribeInput(wav(tiny_whisper.sound(0.001))), "no sound in it"),
        (TranscribeInput(wav(tiny_whisper.sound(1.0)), language="xx"), "language must be one of de, en"),
        (TranscribeInput(wav(tiny_whisper.sound(1.0)), temperature=2.0), "temperature"),
    ):
        with pytest.raises(RequestError, match=words):
            speaking.ask(given)

    async def complete() -> None:
        service = speaking.started.service()
        await service.prepare(GenerateInput(text="w5"), service.make_params({}))

    with pytest.raises(RequestError, match="does not complete text"):
        asyncio.run(complete())
