"""What a running engine tells of its pages is what its pool holds."""

from __future__ import annotations

from serving.engine.api.page_events import PageBatch, PagesRemoved, PagesStored
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.cache.page_log import PageLog
from tests.tiny import tiny_engine


async def test_a_running_engine_tells_what_it_has():
    engine, log, there = tiny_engine(), PageLog(), {}

    def take(batch: PageBatch) -> None:
        for event in batch.events:
            if isinstance(event, PagesStored):
                width = 4 * event.page_size
                for i, one in enumerate(event.hashes):
                    there[one] = event.tokens[i * width : (i + 1) * width]
            elif isinstance(event, PagesRemoved):
                for one in event.hashes:
                    del there[one]

    try:
        engine.call(lambda: engine.scheduler.kv.tell(log.add))
        engine.tell_pages(log, log.close)
        assert engine.client.page_events is log
        log.follow(take)
        log.start()
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        for i in range(12):
            tokens = tuple((7 * i + j) % 60 for j in range(40))
            request = EngineRequest(f"r{i}", tokens, params)
            assert [output async for output in engine.client.generate(request)]
        held = engine.call(lambda: dict(engine.scheduler.kv.managers[0].pool._held))
    finally:
        engine.shutdown()  # which has the log told to its end
    assert there and there == dict(held.values())
