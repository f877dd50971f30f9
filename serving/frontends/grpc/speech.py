"""Speech to text between the wire and the service."""

from __future__ import annotations

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.metrics.logs import request_id_of_task
from serving.service.speech.segments import Segment
from serving.service.speech.transcribe import TranscribeInput, Transcript


def input_from(request: pb.TranscribeRequest) -> TranscribeInput:
    """A whole TranscribeRequest."""
    return TranscribeInput(
        request.sound,
        "translate" if request.translate else "transcribe",
        request.language or None,
        request.prompt or None,
        request.temperature,
        request.segments or request.words,
        request.words,
        request_id=request.request_id or request_id_of_task.get(),
    )


def transcript_to(found: Transcript) -> pb.Transcript:
    """The reply's last part."""
    words = [pb.TranscriptWord(word=word.text, start=word.start, end=word.end) for word in found.words]
    segments = [_segment(one) for one in found.segments]
    return pb.Transcript(
        text=found.text, language=found.language, duration=found.duration, segments=segments, words=words
    )


def _segment(one: Segment) -> pb.TranscriptSegment:
    return pb.TranscriptSegment(
        start=one.start, end=one.end, text=one.text, token_ids=one.tokens, temperature=one.temperature,
        avg_logprob=one.avg_logprob, compression_ratio=one.compression_ratio, no_speech_prob=one.no_speech,
    )  # fmt: skip
