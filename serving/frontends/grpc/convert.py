"""Between the wire's messages and the service's types."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import sampling_pb2
from serving.engine.api.media import Media
from serving.engine.api.sampling_params import StructuredOutputs
from serving.engine.api.types import FinishReason, TokenPair, TransferParams
from serving.errors import ErrorKind, RequestError, invalid
from serving.media.parts import Source
from serving.metrics.logs import request_id_of_task
from serving.service import ChatOptions, GenerateInput, Limits, ScoreInput, TextOutput, TokenLogprob
from serving.service.requests.json_bounds import read_json
from serving.text.tools import ContentDelta, Event, ReasoningDelta, ToolCallArguments, ToolCallStart

FINISH_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}
FINISH_REASON_OF = {wire: reason for reason, wire in FINISH_REASONS.items()}


def input_from(request: pb.GenerateRequest | pb.TokenizeRequest, limits: Limits, **more: Any) -> GenerateInput:
    """The prompt of a request, as the service takes it.

    Raises:
        RequestError: INVALID_ARGUMENT: a tool's JSON does not parse.
    """
    adapter = request.adapter if isinstance(request, pb.GenerateRequest) else ""
    fields: dict[str, Any] = {"model": adapter or request.model or None, **more}
    if request.HasField("add_special_tokens"):
        fields["add_special_tokens"] = request.add_special_tokens
    which = request.WhichOneof("prompt")
    if which == "text":
        fields["text"] = request.text
    elif which == "chat":
        fields.update(_chat(request.chat, limits))
    elif which == "token_ids" and isinstance(request, pb.GenerateRequest):
        fields["token_ids"] = list(request.token_ids.ids)
    if isinstance(request, pb.GenerateRequest) and request.HasField("media"):
        fields.update(media_from(request.media, limits))
    return GenerateInput(**fields)


def generate_input_from(request: pb.GenerateRequest, timeout_s: float | None, limits: Limits) -> GenerateInput:
    """A whole GenerateRequest but for its sampling parameters.

    Args:
        timeout_s: what is left of the call's own deadline; None for none.
    """
    own = request.timeout_s if request.HasField("timeout_s") else None
    return input_from(
        request,
        limits,
        request_id=request.request_id or request_id_of_task.get(),
        priority=request.priority,
        timeout_s=timeout_s if own is None or (timeout_s is not None and timeout_s < own) else own,
        ttft_timeout_s=request.ttft_timeout_s if request.HasField("ttft_timeout_s") else None,
        cache_salt=request.cache_salt or None,
        tenant=request.tenant or None,
        truncate_prompt_tokens=(request.truncate_prompt_tokens if request.HasField("truncate_prompt_tokens") else None),
        transfer=transfer_from(request.kv_transfer) if request.HasField("kv_transfer") else None,
        whole=request.whole,
    )


def media_from(wire: pb.Media, limits: Limits) -> dict[str, Any]:
    """Images, videos and sounds of a prompt of token ids, as fields of GenerateInput.

    Raises:
        RequestError: INVALID_ARGUMENT: a source without content, or options that are no JSON object.
    """
    sources = []
    for i, one in enumerate(wire.sources):
        which = one.WhichOneof("content")
        if which is None:
            raise invalid(f"media.sources[{i}] is empty: give data or a url.", "media")
        video, sound = one.kind == pb.MediaSource.KIND_VIDEO, one.kind == pb.MediaSource.KIND_SOUND
        sources.append(Source(getattr(one, which), f"media.sources[{i}]", video=video, sound=sound))
    said = read_json(wire.processor_json, limits, "media.processor_json") if wire.processor_json else None
    if said is not None and not isinstance(said, dict):
        raise invalid("media.processor_json must be a JSON object.", "media.processor_json")
    return {"media": tuple(sources), "mm_processor_kwargs": said}


def put_media(wire: pb.GenerateRequest, media: Media) -> None:
    """Has a request of token ids bring what its images were made of, in place of the tokens that they have become.

    Raises:
        RequestError: UNIMPLEMENTED, where that is not kept.
    """
    origin = media.origin
    if origin is None:
        raise RequestError(ErrorKind.UNIMPLEMENTED, "Images of this request cannot be sent on to another server.")
    wire.token_ids.ids[:] = origin.token_ids
    for content, kind in origin.sources:
        own = {"url": content} if isinstance(content, str) else {"data": content}
        wire.media.sources.add(kind=pb.MediaSource.Kind.Value(f"KIND_{kind.upper()}"), **own)
    wire.media.processor_json = json.dumps(dict(origin.said)) if origin.said else ""


def transfer_from(wire: pb.KVTransfer) -> TransferParams:
    """Which part of a request another engine does."""
    if wire.port > 65535:
        raise invalid(f"kv_transfer.port is {wire.port}; ports end at 65535.", "kv_transfer")
    return TransferParams(wire.remote_decode, wire.remote_prefill, wire.host, wire.port, wire.ticket)


def transfer_to(params: TransferParams) -> pb.KVTransfer:
    """The wire form."""
    return pb.KVTransfer(**dataclasses.asdict(params))


def names_of(request: pb.GenerateRequest) -> dict[str, str]:
    """The service's names of fields -> the message's, for `serving.errors.named`."""
    which = request.WhichOneof("prompt") or "prompt"
    chat = ("messages", "tools", "tool_choice", "chat_template_kwargs", "continue_final_message")
    return {
        "prompt": which,
        "timeout": "timeout_s",
        "ttft_timeout": "ttft_timeout_s",
        **{name: f"chat.{name}" for name in chat},
    }


def chat_options_from(chat: pb.Chat) -> ChatOptions:
    """What a chat says about tools and thinking."""
    choice: Any = None
    which = chat.tool_choice.WhichOneof("choice") if chat.HasField("tool_choice") else None
    if which == "function":
        choice = {"type": "function", "function": {"name": chat.tool_choice.function}}
    elif which == "mode":
        mode = chat.tool_choice.mode
        if mode not in _MODES:
            raise invalid(f"chat.tool_choice.mode {mode} is not known.", "chat.tool_choice")
        choice = _MODES[mode]
    return ChatOptions(
        choice,
        parallel_tool_calls=chat.parallel_tool_calls if chat.HasField("parallel_tool_calls") else True,
        include_reasoning=chat.include_reasoning if chat.HasField("include_reasoning") else True,
    )


_MODES = {
    pb.ToolChoice.MODE_UNSPECIFIED: None,
    pb.ToolChoice.MODE_NONE: "none",
    pb.ToolChoice.MODE_AUTO: "auto",
    pb.ToolChoice.MODE_REQUIRED: "required",
}


def embed_input_from(request: pb.EmbedRequest | pb.ClassifyRequest, index: int) -> GenerateInput:
    """One input of a request for vectors or labels, as the service takes it."""
    one = request.inputs[index]
    which = one.WhichOneof("input")
    return GenerateInput(
        text=one.text if which == "text" else None,
        token_ids=list(one.token_ids.ids) if which == "token_ids" else None,
        **_shared(request),
    )


def score_input_from(request: pb.ScoreRequest) -> ScoreInput:
    """A whole ScoreRequest.

    Raises:
        RequestError: INVALID_ARGUMENT: a pair that is neither of texts nor of tokens.
    """
    pairs: list[tuple[str, str] | TokenPair] = []
    for i, pair in enumerate(request.pairs):
        which = pair.WhichOneof("pair")
        if which is None:
            raise invalid(f"pairs[{i}] is empty: give texts or tokens.", f"pairs[{i}]")
        if which == "texts":
            pairs.append((pair.texts.first, pair.texts.second))
        else:
            pairs.append(TokenPair(tuple(pair.tokens.token_ids), tuple(pair.tokens.segment_ids)))
    return ScoreInput(pairs, **_shared(request))


def _shared(request: pb.EmbedRequest | pb.ClassifyRequest | pb.ScoreRequest) -> dict[str, Any]:
    return {
        "truncate_prompt_tokens": request.truncate_prompt_tokens
        if request.HasField("truncate_prompt_tokens")
        else None,
        "model": request.model or None,
        "request_id": request.request_id or request_id_of_task.get(),
        "priority": request.priority,
    }


def _chat(chat: pb.Chat, limits: Limits) -> dict[str, Any]:
    opens = chat.add_generation_prompt if chat.HasField("add_generation_prompt") else not chat.continue_final_message
    return {
        "messages": [_message(message) for message in chat.messages],
        "tools": [_tool(tool, i, limits) for i, tool in enumerate(chat.tools)] or None,
        "add_generation_prompt": opens,
        "continue_final_message": chat.continue_final_message,
        "chat_template_kwargs": {
            name: getattr(scalar, kind) if (kind := scalar.WhichOneof("value")) else None
            for name, scalar in chat.chat_template_kwargs.items()
        },
    }


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": message.role, "content": message.content if message.HasField("content") else None}
    if message.parts:
        if message.HasField("content"):
            raise invalid("A message has content or parts, not both.", "chat.messages")
        fields["content"] = [_part(part) for part in message.parts]
    for name in ("name", "tool_call_id"):
        if message.HasField(name):
            fields[name] = getattr(message, name)
    if message.tool_calls:
        fields["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments_json}}
            for c in message.tool_calls
        ]
    return fields


def _part(part: pb.ContentPart) -> dict[str, Any]:
    match part.WhichOneof("part"):
        case "image":
            return {"type": "image", "image": part.image}
        case "image_url":
            return {"type": "image_url", "image_url": {"url": part.image_url}}
        case "video":
            return {"type": "video", "video": part.video}
        case "video_url":
            return {"type": "video_url", "video_url": {"url": part.video_url}}
        case "audio":
            return {"type": "audio", "audio": part.audio}
        case "audio_url":
            return {"type": "audio_url", "audio_url": {"url": part.audio_url}}
        case _:
            return {"type": "text", "text": part.text}


def _tool(tool: pb.Tool, index: int, limits: Limits) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.HasField("description"):
        function["description"] = tool.description
    if tool.HasField("parameters_json"):
        where = f"chat.tools[{index}].parameters_json"
        function["parameters"] = read_json(tool.parameters_json, limits, where, where)
    if tool.HasField("strict"):
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def params_from(params: sampling_pb2.SamplingParams) -> dict[str, Any]:
    """The parameters that a client set, by name; `TextService.make_params` gives the others their defaults."""
    given: dict[str, Any] = {}
    for field in params.DESCRIPTOR.fields:
        name = field.name
        if field.is_repeated:
            values = getattr(params, name)
            if values:
                given[name] = dict(values) if name == "logit_bias" else tuple(values)
        elif params.HasField(name):
            value = getattr(params, name)
            given[name] = _structured(value) if name == "structured_outputs" else value
    return given


def _structured(wire: sampling_pb2.StructuredOutputs) -> StructuredOutputs:
    which = wire.WhichOneof("constraint")
    if which is None:
        return StructuredOutputs()  # which says that one must be set
    if which == "choice":
        return StructuredOutputs(choice=tuple(wire.choice.choices))
    return StructuredOutputs(**{"json" if which == "json_schema" else which: getattr(wire, which)})


def params_to(params: Any) -> sampling_pb2.SamplingParams:
    """The wire form of a `SamplingParams`; None stays unset."""
    wire = sampling_pb2.SamplingParams()
    for field in wire.DESCRIPTOR.fields:
        name, value = field.name, getattr(params, field.name)
        if value is None:
            continue
        if name == "logit_bias":
            wire.logit_bias.update(value)
        elif name == "structured_outputs":
            wire.structured_outputs.CopyFrom(_structured_to(value))
        elif field.is_repeated:
            getattr(wire, name).extend((value,) if isinstance(value, str) else value)
        else:
            setattr(wire, name, value)
    return wire


def _structured_to(grammar: StructuredOutputs) -> sampling_pb2.StructuredOutputs:
    if grammar.choice is not None:
        return sampling_pb2.StructuredOutputs(choice=sampling_pb2.Choices(choices=grammar.choice))
    if grammar.json is not None:
        schema = grammar.json if isinstance(grammar.json, str) else json.dumps(grammar.json)
        return sampling_pb2.StructuredOutputs(json_schema=schema)
    if grammar.json_object:
        return sampling_pb2.StructuredOutputs(json_object=True)
    if grammar.regex is not None:
        return sampling_pb2.StructuredOutputs(regex=grammar.regex)
    return sampling_pb2.StructuredOutputs(grammar=grammar.grammar)


def response_to(request_id: str, output: TextOutput) -> pb.GenerateResponse:
    """One delta on the wire."""
    wire = pb.GenerateResponse(request_id=request_id, index=output.index, text=output.text, token_ids=output.token_ids)
    if output.logprobs is not None:
        wire.logprobs.extend(_logprob(entry) for entry in output.logprobs)
    if output.prompt_logprobs is not None:
        wire.prompt_logprobs.extend(pb.TokenLogprob() if e is None else _logprob(e) for e in output.prompt_logprobs)
    if output.finish_reason is None:
        return wire
    wire.finish_reason = FINISH_REASONS[output.finish_reason]
    if isinstance(output.stop_reason, str):
        wire.stop_string = output.stop_reason
    elif output.stop_reason is not None:
        wire.stop_token_id = output.stop_reason
    if output.transfer is not None:
        wire.kv_transfer.CopyFrom(transfer_to(output.transfer))
    times = output.times
    wire.usage.CopyFrom(
        pb.Usage(
            prompt_tokens=output.num_prompt_tokens,
            cached_tokens=output.num_cached_tokens,
            completion_tokens=output.num_completion_tokens,
            queue_s=_since(times.arrival, times.scheduled),
            time_to_first_token_s=_since(times.arrival, times.first_token),
            total_s=_since(times.arrival, times.finished),
            accepted_drafts=output.accepted_drafts,
            rejected_drafts=output.rejected_drafts,
        )
    )
    return wire


def put_events(wire: pb.GenerateResponse, events: Sequence[Event]) -> None:
    """Puts what a parser made of a delta's text in the text's place."""
    wire.text = "".join(event.text for event in events if isinstance(event, ContentDelta))
    wire.reasoning = "".join(event.text for event in events if isinstance(event, ReasoningDelta))
    for event in events:
        if isinstance(event, ToolCallStart):
            wire.tool_calls.append(pb.ToolCallDelta(index=event.index, id=event.call_id, name=event.name))
        elif isinstance(event, ToolCallArguments):
            wire.tool_calls.append(pb.ToolCallDelta(index=event.index, arguments_json=event.text))


def _logprob(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        token=entry.token,
        token_bytes=entry.bytes,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[
            pb.TopLogprob(token_id=e.token_id, token=e.token, token_bytes=e.bytes, logprob=e.logprob) for e in entry.top
        ],
    )


def _since(start: float, end: float) -> float:
    """Seconds from a milestone to another; 0 where the latter was not reached."""
    return max(0.0, end - start) if end else 0.0
