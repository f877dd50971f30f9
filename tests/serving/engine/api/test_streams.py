"""What waits for a slow reader: merged, in order, and small."""

from __future__ import annotations

import asyncio

from serving.engine.api.streams import MAX_ITEMS, OutputStream
from serving.engine.api.types import EngineOutput, FinishReason, RequestTimes, TokenLogprobs
from serving.errors import ErrorKind, RequestError


def _output(i, last=False):
    return EngineOutput(
        "r",
        (i,),
        (TokenLogprobs(i, -0.5, 1),),
        prompt_logprobs=(None,) if i == 0 else None,
        finish_reason=FinishReason.LENGTH if last else None,
        times=RequestTimes(1.0, 2.0, 3.0, 9.0 if last else 0.0),
    )


async def test_a_reader_that_reads_nothing_costs_token_ids_and_no_objects():
    stream = OutputStream(asyncio.get_running_loop())
    count = 10 * MAX_ITEMS + 7
    for i in range(count):
        stream.put(_output(i, i == count - 1))
        assert len(stream._items) < MAX_ITEMS
    outputs = [output async for output in stream]
    assert [t for o in outputs for t in o.token_ids] == list(range(count))
    assert [e.token_id for o in outputs for e in o.logprobs] == list(range(count))
    assert outputs[0].prompt_logprobs == (None,) and outputs[-1].finish_reason is FinishReason.LENGTH
    assert outputs[-1].times.finished == 9.0


async def test_what_came_before_an_error_comes_first():
    stream = OutputStream(asyncio.get_running_loop())
    for i in range(MAX_ITEMS + 1):
        stream.put(_output(i))
    stream.fail(RequestError(ErrorKind.INTERNAL, "it died."))
    seen = []
    try:
        async for output in stream:
            seen += output.token_ids
    except RequestError as error:
        seen.append(error.message)
    assert seen == [*range(MAX_ITEMS + 1), "it died."]


async def test_a_reader_that_waits_is_woken_and_one_that_was_cancelled_is_not():
    stream = OutputStream(asyncio.get_running_loop())
    reader = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0)
    stream.put(_output(0))
    stream.put(_output(1))  # before it has run: both are one output
    assert (await reader).token_ids == (0, 1)
    reader = asyncio.ensure_future(anext(aiter(stream)))
    await asyncio.sleep(0)
    reader.cancel()
    stream.put(_output(2))  # nobody takes it, and nothing fails
    await asyncio.gather(reader, return_exceptions=True)
    stream.put(_output(3, last=True))
    assert [t async for o in stream for t in o.token_ids] == [2, 3]
