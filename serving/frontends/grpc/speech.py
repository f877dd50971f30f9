"""Speech to text between the wire and the service, on both sides of it."""

from __future__ import annotations

from proto.jaxserve.v1 import inference_pb2 as pb
from serving.metrics.logs import request_id_of_task
from serving.service.speech.doubts import Doubts
from serving.service.speech.segments import Segment
from serving.service.speech.transcripts import TranscribeInput, Transcript
from serving.service.speech.words import Word


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
        _doubts(request),
        request_id=request.request_id or request_id_of_task.get(),
    )


THRESHOLDS = {
    "compression_ratio_threshold": "compression", "logprob_threshold": "logprob", "no_speech_threshold": "no_speech",
}  # fmt: skip


def _doubts(request: pb.TranscribeRequest) -> Doubts | None:
    said = {own: getattr(request, name) for name, own in THRESHOLDS.items() if request.HasField(name)}
    return Doubts(**said) if said else None


def request_of(given: TranscribeInput, stream: bool) -> pb.TranscribeRequest:
    """What `input_from` reads."""
    wire = pb.TranscribeRequest(
        sound=given.data, request_id=given.request_id or "", translate=given.task == "translate", language=given.language or "",
        prompt=given.prompt or "", temperature=given.temperature, segments=given.segments, words=given.words, stream=stream,
    )  # fmt: skip
    if given.doubts is not None:
        for name, own in THRESHOLDS.items():
            if (bound := getattr(given.doubts, own)) is not None:
                setattr(wire, name, bound)
    return wire


def transcript_from(found: pb.Transcript, task: str) -> Transcript:
    """What `transcript_to` wrote; all words are the first segment's."""
    words = tuple(Word(one.word, one.start, one.end, 0) for one in found.words)
    segments = [
        Segment(
            one.seek, one.start, one.end, tuple(one.token_ids), one.text, one.temperature,
            one.avg_logprob if one.HasField("avg_logprob") else None,
            one.no_speech_prob if one.HasField("no_speech_prob") else None, () if i else words,
        )
        for i, one in enumerate(found.segments)
    ]  # fmt: skip
    return Transcript(task, found.language, found.duration, tuple(segments))


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
        seek=one.seek, avg_logprob=one.avg_logprob, compression_ratio=one.compression_ratio, no_speech_prob=one.no_speech,
    )  # fmt: skip
