"""Transcribe over gRPC."""

import grpc
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.service.speech.transcribe import Speech
from tests.mock_engine import MockEngine, until
from tests.serving.frontends.openai.test_audio import SOUND, TOKENS, Speaking, align


async def parts(s, **fields):
    return [reply async for reply in s.inference.Transcribe(pb.TranscribeRequest(language="en", **fields))]


async def test_a_transcript_with_words_whole_and_in_pieces(serve):
    engine = Speaking(reply=lambda request: [*b"hi there"])
    async with serve(engine, speech=Speech(TOKENS, 80, align)) as s:
        (whole,) = await parts(s, sound=SOUND, words=True)
        found = whole.transcript
        assert (found.text, found.language, found.duration) == ("hi there", "en", 1.0)
        assert [(word.word, round(word.end, 1)) for word in found.words] == [("hi", 0.2), ("there", 0.8)]
        assert found.segments[0].token_ids == [*b"hi there"]
        *pieces, last = await parts(s, sound=SOUND, stream=True)
        assert "".join(piece.delta for piece in pieces) == last.transcript.text == "hi there"


async def test_what_is_refused(serve):
    async with serve(MockEngine()) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await parts(s, sound=SOUND)
        assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    async with serve(Speaking(reply=lambda request: []), speech=Speech(TOKENS, 80)) as s:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await parts(s, sound=b"nothing")
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_the_calls_deadline_ends_it(serve):
    engine = Speaking(reply=lambda request: [*b"a" * 4000], step_s=0.01, max_model_len=8192)
    async with serve(engine, speech=Speech(TOKENS, 80)) as s:
        asked = pb.TranscribeRequest(language="en", sound=SOUND)
        for seconds in (0.5, 4.0, 30.0):  # on a slow machine it takes longer until it runs
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                _ = [reply async for reply in s.inference.Transcribe(asked, timeout=seconds)]
            assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
            if engine.requests:
                break
        await until(lambda: engine.requests and not engine.live, "it was aborted")
