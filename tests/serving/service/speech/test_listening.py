"""Sound of many requests at once: how much of it is held, and for how long."""

import asyncio
import gc

import numpy as np
import pytest

from serving.errors import ErrorKind, RequestError
from serving.media.spectrum import log_mel
from serving.service.speech import listening
from serving.service.speech.listening import Listener
from tests.models.tiny_whisper import sound, wav


async def test_short_sounds_are_filled_up():
    samples = sound(1.5)
    frames, heard = await Listener(80, 48_000).spectrogram(wav(samples))
    assert heard == len(samples) and np.array_equal(frames, log_mel(np.pad(samples, (0, 24_000))))


async def test_what_is_held_is_bounded_and_given_back(monkeypatch):
    monkeypatch.setattr(listening, "HELD_BYTES", 2 * 300 * 80 * 4)
    listener, data = Listener(80, 16_000), wav(sound(3.0))
    held = [(await listener.spectrogram(data))[0] for _ in range(2)]
    with pytest.raises(RequestError, match="more than") as refused:
        await listener.spectrogram(data)
    assert refused.value.kind is ErrorKind.RESOURCE_EXHAUSTED
    with pytest.raises(RequestError, match="cannot be read"):
        await listener.spectrogram(b"no sound")
    held.clear()
    gc.collect()
    asked = [asyncio.ensure_future(listener.spectrogram(data)) for _ in range(2)]
    await asyncio.sleep(0)
    for one in asked:  # whoever goes away leaves nothing behind
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await listener.run(gc.collect)
    await listener.run(gc.collect)
    assert listener._held == 0
