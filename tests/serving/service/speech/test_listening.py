"""Sound of many requests at once: how much of it is held, and for how long."""

import asyncio
import gc
import threading

import numpy as np
import pytest

from serving.errors import ErrorKind, RequestError
from serving.media.sound import files as media_sound
from serving.media.sound.spectrum import log_mel
from serving.service.speech import listening
from serving.service.speech.listening import Frames, Listener
from tests.mock_engine import until
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
    await until(lambda: gc.collect() >= 0 and not listener._held, "all is given back")


async def test_whoever_goes_away_while_it_is_read_leaves_nothing_behind(monkeypatch):
    """Though the tasks are kept, as those are that somebody looks at later."""
    begun, goes_on, read = threading.Semaphore(0), threading.Event(), listening.sound_pieces

    def pieces(data, *args):
        begun.release()
        goes_on.wait(60)
        yield from read(data, *args)

    monkeypatch.setattr(listening, "sound_pieces", pieces)
    listener, data = Listener(80, 16_000), wav(sound(3.0))
    asked = [asyncio.ensure_future(listener.spectrogram(data)) for _ in range(2)]
    for _ in asked:
        assert await asyncio.to_thread(begun.acquire, timeout=60)
    for one in asked:
        one.cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    goes_on.set()
    both = threading.Barrier(2)  # of its threads: behind what they read
    await asyncio.gather(*(listener.run(both.wait, 60) for _ in asked))
    await until(lambda: gc.collect() >= 0 and not listener._held, "all is given back")
    assert all(one.cancelled() for one in asked)


async def test_short_sounds_do_not_wait_for_long_ones(monkeypatch):
    """Nor do other requests' windows, whatever is behind the beginnings of how many long files."""
    short_is_heard, read = threading.Event(), listening.sound_pieces

    def pieces(data, *args):
        for i, piece in enumerate(read(data, *args)):
            if i > 1 and data is long:
                short_is_heard.wait(60)
            yield piece

    monkeypatch.setattr(media_sound, "PIECE", 1 << 13)
    monkeypatch.setattr(listening, "sound_pieces", pieces)
    monkeypatch.setattr(listening, "SHORT_S", 0.6)
    listener, long = Listener(80, 16_000), wav(sound(3.0))
    asked = [asyncio.ensure_future(listener.spectrogram(long)) for _ in range(4)]
    try:
        frames, _ = await listener.spectrogram(wav(sound(0.4)))
        assert len(await listener.run(frames.copy)) == 100 and not any(one.done() for one in asked)
    finally:
        short_is_heard.set()
    assert [heard for _, heard in await asyncio.gather(*asked)] == [48_000] * 4


def test_the_shortest_is_read_first_and_of_equal_ones_one_after_the_other():
    turns, order, begin = listening._Turns(), [], threading.Event()
    turns.submit((0.0, 0), begin.wait, 60)
    keys = [(9.0, 1), (3.0, 2), (9.0, 0), (3.5, 4)]
    asked = [turns.submit(key, order.append, key) for key in keys]
    assert turns.submit((1.0, 9), order.append, None).cancel()
    begin.set()
    for one in asked:
        one.result(60)
    assert order == sorted(keys)
    with pytest.raises(ZeroDivisionError):
        turns.submit((0.0, 5), divmod, 1, 0).result(60)


def test_a_file_is_as_long_as_it_says_or_as_what_was_read_of_it(monkeypatch):
    monkeypatch.setattr(media_sound, "PIECE", 16_000)
    monkeypatch.setattr(listening, "SHORT_S", 0.5)
    data = wav(sound(3.0))
    assert [one for one in Listener(80, 16_000)._read(data) if isinstance(one, float)] == [3.0] * 4
    monkeypatch.setattr(listening, "said_seconds", lambda data: 1.5)
    assert [one for one in Listener(80, 16_000)._read(data) if isinstance(one, float)] == [1.5, 2.0, 3.0, 3.0]


async def test_so_many_long_sounds_at_once_hold_little(monkeypatch):
    """Each is known to be long before anything of it is kept, or is found to be where its header lies."""
    monkeypatch.setattr(listening, "KEPT_BYTES", 300 * 80 * 4)
    monkeypatch.setattr(listening, "HELD_BYTES", 8 * 250 * 80 * 4)  # less than what is kept of as many shorter ones
    monkeypatch.setattr(media_sound, "PIECE", 1 << 14)
    listener, data = Listener(80, 16_000), wav(sound(6.0))
    found = await asyncio.gather(*(listener.spectrogram(data) for _ in range(8)))
    assert {heard for _, heard in found} == {96_000} and listener._held == 0
    for said, seconds, kept in ((100.0, 0.5, True), (100.0, 4.0, False), (0.1, 2.5, True), (0.1, 4.0, False)):
        monkeypatch.setattr(listening, "said_seconds", lambda data, said=said: said)
        samples = sound(seconds)
        frames, heard = await listener.spectrogram(wav(samples))
        assert isinstance(frames, np.ndarray) == kept and heard == len(samples)
        wanted = log_mel(np.pad(samples, (0, max(0, 16_000 - heard))))
        np.testing.assert_allclose(await listener.rows(frames, 0, len(wanted)), wanted, atol=1e-6)


async def test_long_sounds_are_read_again_window_by_window(monkeypatch):
    """The same numbers, and hardly anything held."""
    monkeypatch.setattr(listening, "KEPT_BYTES", 300 * 80 * 4)
    monkeypatch.setattr(media_sound, "PIECE", 1 << 14)
    samples = np.concatenate([sound(8.0, 1) * 0.1, np.zeros(50_000, np.float32), sound(9.0, 2), sound(3.003, 3) * 0.01])
    listener, whole = Listener(80, 16_000), log_mel(samples)
    for kind, rate in (("WAV", 16_000), ("FLAC", 22_050)):
        data = wav(samples, rate=rate, kind=kind, subtype="FLOAT" if kind == "WAV" else "PCM_16")
        frames, heard = await listener.spectrogram(data)
        assert isinstance(frames, Frames) and listener._held == 0 and len(frames) == heard // 160
        wanted = whole if rate == 16_000 else log_mel(media_sound.read_sound(data, 100.0, "file"))
        assert len(wanted) == len(frames)
        at = 0
        while at < len(frames):  # windows overlap, as they do where a segment was not finished
            rows = await listener.rows(frames, at, 700)
            np.testing.assert_allclose(rows, wanted[at : at + 700], atol=1e-6)
            assert len(frames._there) < 700 + 700
            at += 433
    short, _ = await listener.spectrogram(wav(sound(2.0)))
    assert isinstance(short, np.ndarray) and np.array_equal(await listener.rows(short, 50, 10), short[50:60])
