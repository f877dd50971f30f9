"""Which prompts a gateway has computed elsewhere, and by whom."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace

import pytest

from serving.engine.api.media import Media, MediaOrigin
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineOutput, EngineRequest, FinishReason
from serving.errors import ErrorKind, RequestError
from serving.gateway.prefills import Prefills
from tests.mock_engine import MockEngine

DECODES = dataclasses.replace(MockEngine().info(), role="decode")


class Helper:
    """Computes prompts, as long as it may."""

    adapters = None

    def __init__(self, role="prefill"):
        self.healthy, self.requests, self.released = True, [], []
        self.go, self.error, self.ended = asyncio.Event(), None, 0
        self._info = dataclasses.replace(DECODES, role=role)

    def info(self):
        return self._info

    async def release(self, ticket):
        self.released.append(ticket)

    async def generate(self, request):
        self.requests.append(request)
        try:
            await self.go.wait()
            if self.error is not None:
                raise self.error
            yield EngineOutput(request.request_id, (1,), finish_reason=FinishReason.LENGTH)
        finally:
            self.ended += 1


def request(length=600, name="r", **more):
    return EngineRequest(name, tuple(range(length)), SamplingParams(max_tokens=50, temperature=0.7, logprobs=2), **more)


def prefills(*helpers, policy="auto"):
    found = Prefills(policy)
    for i, helper in enumerate(helpers):
        found.add(f"10.0.0.{i}:50051", helper)
    return found


async def test_a_prompt_with_an_image_is_computed_by_who_reads_images():
    blind, sees = Helper(), Helper()
    sees._info = dataclasses.replace(sees.info(), modalities=("image",))
    image = Media((), 600, origin=MediaOrigin((), ((b"", "image"),), {}))
    found = prefills(blind)
    assert found.decide(request(media=image), DECODES, 0, 3) is None and found.decisions["none"] == 1
    found.add("10.0.0.9:50051", sees)
    helper = found.decide(request(media=image), DECODES, 0, 3)
    assert helper is not None and helper.client is sees


@pytest.mark.parametrize(
    ("given", "matched", "running", "info", "reason"),
    [
        (request(), 0, 3, DECODES, "apart"),
        (request(), 400, 3, DECODES, "short"),
        (request(200), 0, 3, DECODES, "short"),
        (request(), 0, 0, DECODES, "alone"),
        (request(), 0, 3, dataclasses.replace(DECODES, role=""), "unfit"),
        (request(), 0, 3, dataclasses.replace(DECODES, role="prefill"), "unfit"),
        (request(pooling="mean"), 0, 3, DECODES, "unfit"),
    ],
)
async def test_decisions(given, matched, running, info, reason):
    found = prefills(Helper())
    chosen = found.decide(given, info, matched, running)
    assert found.decisions == {reason: 1} and (chosen is not None) == (reason == "apart")


async def test_a_helper_without_the_adapter_is_not_asked():
    helper = Helper()
    found = prefills(helper)
    assert found.decide(request(adapter="digest"), DECODES, 0, 3) is None and found.decisions == {"none": 1}
    helper.adapters = SimpleNamespace(infos=lambda: [SimpleNamespace(digest="digest")])
    assert found.decide(request(adapter="digest"), DECODES, 0, 3) is not None


async def test_a_busy_helper_is_not_worth_the_wait():
    found = prefills(Helper())
    found.costs.token_s, found.costs.lag_s = 0.001, 0.1
    (helper,) = found.helpers.values()
    assert found.decide(request(), DECODES, 0, 2) is helper  # 1.2 s of streams against 0.1
    helper.queued = 2_000
    assert found.decide(request(), DECODES, 0, 2) is None
    assert found.decide(request(), DECODES, 0, 4) is helper  # more streams are held up
    assert found.decisions == {"apart": 2, "busy": 1}
    helper.client.healthy = False
    assert found.decide(request(), DECODES, 0, 4) is None and found.decisions["none"] == 1


async def test_one_bad_measurement_is_not_believed_for_ever():
    found = prefills(Helper())
    found.costs.token_s, found.costs.lag_s = 0.001, 60.0
    tries = next(n for n in range(100) if found.decide(request(), DECODES, 0, 2) is not None)
    assert 20 < tries < 50


async def test_each_side_is_told_of_the_other():
    helper = Helper()
    found = prefills(helper)
    async with found.helped(request(), "target", DECODES, 0, 3) as (helped, note):
        await asyncio.sleep(0)
        (asked,) = helper.requests
        assert asked.params == SamplingParams(temperature=0.0, max_tokens=1) and asked.transfer.remote_decode
        assert (helped.transfer.host, helped.transfer.port) == ("10.0.0.0", 50051) and helped.transfer.remote_prefill
        assert helped.transfer.ticket == asked.transfer.ticket and len(asked.transfer.ticket) == 32
        assert helped.params == request().params and found.helpers["10.0.0.0:50051"].queued == 600
        helper.go.set()
        await asyncio.sleep(0.01)
        note.begun()
    assert helper.ended == 1 and found.costs.token_s > 0 and found.costs.lag_s >= 0
    assert found.helpers["10.0.0.0:50051"].queued == 0


async def test_completions_of_one_prompt_share_it_and_the_last_one_ends_it():
    helper = Helper()
    found = prefills(helper)
    first, second = (found.helped(request(name=f"r{i}"), "target", DECODES, 0, 3) for i in range(2))
    one, _ = await first.__aenter__()
    other, _ = await second.__aenter__()
    assert one.transfer == other.transfer and found.decisions == {"apart": 1}
    await asyncio.sleep(0)
    await first.__aexit__(None, None, None)
    await asyncio.sleep(0.01)
    assert helper.ended == 0
    await second.__aexit__(None, None, None)
    await asyncio.sleep(0.01)
    assert helper.ended == 1, "nobody wants it any more"
    assert len(helper.requests) == 1


async def test_a_helper_that_refuses_keeps_nobody_waiting():
    helper = Helper()
    helper.error = RequestError(ErrorKind.RESOURCE_EXHAUSTED, "full.")
    helper.go.set()
    found = prefills(helper)
    async with found.helped(request(), "target", DECODES, 0, 3) as (helped, _):
        await asyncio.sleep(0.01)
        assert helper.released == [helped.transfer.ticket] and found.failures == 1


async def test_the_least_busy_helper_is_asked():
    found = prefills(Helper(), Helper(), policy="always")
    first, second = found.helpers.values()
    first.queued = 100
    assert found.decide(request(), DECODES, 0, 0) is second


def test_an_engine_without_the_role_is_no_helper():
    with pytest.raises(ValueError, match="--role prefill"):
        prefills(Helper(role="decode"))
