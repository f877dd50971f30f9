"""A write may take so long and no longer, whatever the others took; one timer a stream watches all of them."""

from __future__ import annotations

import asyncio

import pytest

from serving.frontends.sockets.stalled import ReaderStalledError, StallWatch


class Clock:
    """The loop's time and timers, moved by hand."""

    def __init__(self):
        self.now = 0.0
        self.timers = []  # [when, function, handle]

    def time(self):
        return self.now

    def call_later(self, delay, function):
        handle = asyncio.TimerHandle(self.now + delay, function, (), asyncio.get_running_loop())
        self.timers.append((self.now + delay, function, handle))
        return handle

    def advance(self, seconds):
        """Runs what is due meanwhile, each at its time."""
        end = self.now + seconds
        while due := sorted((t for t in self.timers if t[0] <= end), key=lambda t: t[0]):
            self.now = due[0][0]
            self.timers.remove(due[0])
            if not due[0][2].cancelled():
                due[0][1]()
        self.now = end


class Reader:
    """Takes a message when told."""

    def __init__(self):
        self.asked, self.taken = asyncio.Event(), []
        self._room = asyncio.Semaphore(0)

    async def send(self, message):
        self.asked.set()
        await self._room.acquire()
        self.taken.append(message)

    async def take(self):
        await self.asked.wait()
        self.asked.clear()
        self._room.release()


@pytest.fixture
async def watched(monkeypatch):
    """(watch, clock, reader): no more than 10 s a write."""
    watch, clock = StallWatch(10.0), Clock()
    monkeypatch.setattr(watch, "_loop", clock)
    return watch, clock, Reader()


async def test_a_write_that_is_never_taken_is_given_up_at_its_limit(watched):
    watch, clock, reader = watched
    task = asyncio.ensure_future(watch.write(reader.send, "a"))
    await reader.asked.wait()
    clock.advance(9.9)
    await asyncio.sleep(0)
    assert not task.done()
    clock.advance(0.2)
    with pytest.raises(ReaderStalledError):
        await task
    assert reader.taken == [] and not task.cancelled()


async def test_writes_that_are_slow_but_taken_go_on_for_ever(watched):
    watch, clock, reader = watched

    async def write_all():
        for i in range(20):
            await watch.write(reader.send, i)

    task = asyncio.ensure_future(write_all())
    for _ in range(20):
        await reader.asked.wait()
        clock.advance(7.0)  # 140 s in all
        assert len(clock.timers) == 1
        await reader.take()
    await task
    assert reader.taken == list(range(20))


async def test_the_limit_counts_from_the_write_that_waits_not_from_the_timer(watched):
    watch, clock, reader = watched

    async def write_two():
        await watch.write(reader.send, "a")
        clock.advance(9.0)  # nothing to write
        await watch.write(reader.send, "b")

    task = asyncio.ensure_future(write_two())
    await reader.take()
    await reader.asked.wait()
    clock.advance(9.0)  # the timer of the first write looked 8 s ago
    await asyncio.sleep(0)
    assert not task.done()
    clock.advance(1.5)
    with pytest.raises(ReaderStalledError):
        await task


async def test_many_quick_writes_make_one_timer(watched):
    watch, clock, _ = watched

    async def send(message):
        pass

    for i in range(1000):
        await watch.write(send, i)
    assert len(clock.timers) == 1
    watch.close()
    assert clock.timers[0][2].cancelled()
    clock.advance(100.0)
    assert clock.timers == []


async def test_an_idle_stream_has_no_timer(watched):
    watch, clock, _ = watched

    async def send(message):
        pass

    await watch.write(send, "a")
    clock.advance(11.0)
    assert clock.timers == []
    await watch.write(send, "b")
    assert len(clock.timers) == 1


@pytest.mark.parametrize("stalled_too", [False, True])
async def test_another_cancellation_stays_one(watched, stalled_too):
    watch, clock, reader = watched
    task = asyncio.ensure_future(watch.write(reader.send, "a"))
    await reader.asked.wait()
    task.cancel()
    if stalled_too:
        clock.advance(11.0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_failure_of_the_write_is_its_own(watched):
    watch, _, _ = watched

    async def send(message):
        raise OSError("broken pipe")

    with pytest.raises(OSError, match="broken"):
        await watch.write(send, "a")


async def test_without_a_limit_nothing_is_watched(monkeypatch):
    watch, clock = StallWatch(None), Clock()
    monkeypatch.setattr(watch, "_loop", clock)
    reader = Reader()
    task = asyncio.ensure_future(watch.write(reader.send, "a"))
    await reader.take()
    await task
    assert clock.timers == [] and reader.taken == ["a"]
