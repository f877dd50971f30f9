"""The services of jaxserve.v1, as calls of the `TextService` of a request's model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from proto.jaxserve.v1 import control_pb2, inference_pb2
from serving import memory
from serving.access import caller_of_task
from serving.engine.api.types import EngineStats
from serving.errors import ErrorKind, RequestError, invalid, named
from serving.frontends.grpc import convert, figures, speech
from serving.frontends.grpc.bounds import LARGE_BYTES, check_counts, check_wire
from serving.frontends.grpc.context import begin_call, end_call, id_metadata
from serving.frontends.grpc.control import ControlCalls, loaded_adapters
from serving.frontends.grpc.errors import status_of
from serving.frontends.grpc.transfer import Transfer
from serving.frontends.sockets.stalled import ReaderStalledError, StallWatch
from serving.service import Limits, Served, prepare_chat, stats_of
from serving.service.speech.transcribe import transcribe
from serving.service.vectors import shortened, together

log = logging.getLogger(__name__)
Context = Any  # grpc.aio.ServicerContext, which is generic in types that bytes-level handlers do not have

INFERENCE: ServiceDescriptor = inference_pb2.DESCRIPTOR.services_by_name["Inference"]
CONTROL: ServiceDescriptor = control_pb2.DESCRIPTOR.services_by_name["Control"]


class Inference:
    """Generate, Embed, Score, Classify, Transcribe, Tokenize, Detokenize.

    Args:
        service: gives what is served, or raises UNAVAILABLE while there is nothing yet.
    """

    descriptor = INFERENCE

    def __init__(self, service: Callable[[], Served]) -> None:
        self._service = service

    async def Generate(  # noqa: N802 - named as in the .proto
        self, request: inference_pb2.GenerateRequest, context: Context
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        service = self._service().of(request.model or request.adapter)
        remaining = context.time_remaining()
        if remaining is not None and remaining <= 0:
            raise RequestError(ErrorKind.DEADLINE_EXCEEDED, "The call's deadline has passed.")
        limit = service.limits.max_timeout_s
        timeout = remaining if remaining is None or remaining <= limit else None
        if request.adapter and request.model not in ("", request.adapter, *service.model_names):
            raise invalid("adapter and model name two different ones: leave model empty.", "adapter")
        given = convert.generate_input_from(request, timeout, service.limits)
        params = convert.params_from(request.sampling_params)
        with named(convert.names_of(request)):
            if given.messages is None or params.get("detokenize") is False:
                prepared = await service.prepare(given, service.make_params(params))
            else:
                prepared = await prepare_chat(service, given, params, convert.chat_options_from(request.chat))
        async with contextlib.aclosing(service.generate(prepared)) as outputs:
            async for output in outputs:
                message = convert.response_to(prepared.request_id, output)
                if output.events is not None:
                    convert.put_events(message, output.events)
                    if output.called and message.finish_reason == inference_pb2.FINISH_REASON_STOP:
                        message.finish_reason = inference_pb2.FINISH_REASON_TOOL_CALLS
                yield message

    async def Embed(  # noqa: N802
        self, request: inference_pb2.EmbedRequest, context: Context
    ) -> inference_pb2.EmbedResponse:
        service = self._service().of(request.model)
        if not request.inputs:
            raise invalid("inputs is empty: give at least one text.", "inputs")
        service.limits.check_count("inputs", len(request.inputs), service.limits.max_batch, "inputs")
        dimensions = request.dimensions if request.HasField("dimensions") else None
        given = [convert.embed_input_from(request, i) for i in range(len(request.inputs))]
        found = await together([service.embed(one, pooling=request.pooling or None) for one in given])
        return inference_pb2.EmbedResponse(
            embeddings=[
                inference_pb2.Embedding(
                    values=shortened(one.vector, dimensions), prompt_tokens=len(one.prompt_token_ids)
                )
                for one in found
            ]
        )

    async def Score(  # noqa: N802
        self, request: inference_pb2.ScoreRequest, context: Context
    ) -> inference_pb2.ScoreResponse:
        found = await self._service().of(request.model).score(convert.score_input_from(request))
        return inference_pb2.ScoreResponse(scores=found.values, prompt_tokens=found.prompt_tokens)

    async def Classify(  # noqa: N802
        self, request: inference_pb2.ClassifyRequest, context: Context
    ) -> inference_pb2.ClassifyResponse:
        service = self._service().of(request.model)
        if not request.inputs:
            raise invalid("inputs is empty: give at least one text.", "inputs")
        service.limits.check_count("inputs", len(request.inputs), service.limits.max_batch, "inputs")
        given = [convert.embed_input_from(request, i) for i in range(len(request.inputs))]
        found = await together([service.classify(one, raw=request.raw) for one in given])
        return inference_pb2.ClassifyResponse(
            labels=service.info.labels,
            classifications=[
                inference_pb2.Classification(values=one.values, prompt_tokens=len(one.prompt_token_ids))
                for one in found
            ],
        )

    async def Transcribe(  # noqa: N802
        self, request: inference_pb2.TranscribeRequest, context: Context
    ) -> AsyncIterator[inference_pb2.TranscribeResponse]:
        service = self._service().of(request.model)
        told: asyncio.Queue[str | None] = asyncio.Queue()
        tell = told.put_nowait if request.stream else None
        run = transcribe(service, speech.input_from(request), request.model or None, tell)
        task = asyncio.ensure_future(run)
        task.add_done_callback(lambda _: told.put_nowait(None))
        try:
            while (delta := await told.get()) is not None:
                yield inference_pb2.TranscribeResponse(delta=delta)
            yield inference_pb2.TranscribeResponse(transcript=speech.transcript_to(await task))
        finally:
            task.cancel()

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Context
    ) -> inference_pb2.TokenizeResponse:
        service = self._service().of(request.model)
        text, ids = await service.tokenize(convert.input_from(request, service.limits))
        return inference_pb2.TokenizeResponse(token_ids=ids, text=text or "", max_model_len=service.info.max_model_len)

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Context
    ) -> inference_pb2.DetokenizeResponse:
        text = (
            await self._service()
            .of(request.model)
            .detokenize(request.token_ids, skip_special_tokens=request.skip_special_tokens, model=request.model or None)
        )
        return inference_pb2.DetokenizeResponse(text=text)


class Control(ControlCalls):
    """GetServerInfo, GetModelInfo, Abort; and what changes the server."""

    descriptor = CONTROL

    async def GetServerInfo(  # noqa: N802
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        served = self._service()
        info = served.first.info
        stats = stats_of(served) if self._access.may_see_figures(caller_of_task.get()) else EngineStats()
        return control_pb2.GetServerInfoResponse(
            version=info.version,
            platform=info.platform,
            mesh=info.mesh,
            uptime_s=time.monotonic() - served.started,
            draining=served.draining,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            num_pages_free=stats.num_pages_free,
            num_pages_total=stats.num_pages_total,
            prompt_tokens=stats.prompt_tokens,
            generation_tokens=stats.generation_tokens,
            num_steps=stats.num_steps,
            num_preemptions=stats.num_preemptions,
            num_recompilations=stats.num_recompilations,
            prefix_queries=stats.prefix_queries,
            prefix_hits=stats.prefix_hits,
            num_scheduled_tokens=stats.num_scheduled_tokens_total,
            num_bucket_tokens=stats.num_bucket_tokens_total,
            host_time_s=stats.host_time_s_total,
            device_wait_time_s=stats.device_wait_time_s_total,
            num_drafts=stats.num_drafts,
            num_draft_tokens=stats.num_draft_tokens,
            num_accepted_tokens=stats.num_accepted_tokens,
            accepted_per_pos=stats.accepted_per_pos or (),
            media_queries=stats.media_queries,
            media_hits=stats.media_hits,
            media_time_s=stats.media_time_s_total,
            takes_adapters=any(service.adapters.open for service in served.visible()),
            adapters=loaded_adapters(served),
            transfers=None if stats.transfers is None else figures.stats_to(stats.transfers),
        )

    async def GetModelInfo(  # noqa: N802
        self, request: control_pb2.GetModelInfoRequest, context: Context
    ) -> control_pb2.GetModelInfoResponse:
        service = self._service().of(request.model)
        name = service.resolve_model(request.model)
        info, base = service.info, name == service.model_id
        return control_pb2.GetModelInfoResponse(
            id=name,
            names=service.model_names if base else (name,),
            parent="" if base else service.model_id,
            architecture=info.architecture,
            num_parameters=info.num_parameters,
            vocab_size=info.vocab_size,
            max_model_len=info.max_model_len,
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            page_size=info.page_size,
            num_pages=info.num_pages,
            dtype=info.dtype,
            quantization=info.quantization or "",
            eos_token_ids=service.voice(name).tokenizer.eos_token_ids,
            has_chat_template=service.voice(name).chat_template is not None,
            tasks=info.tasks,
            pooling=info.pooling,
            prompts=dict(info.prompts),
            default_prompt=info.default_prompt,
            labels=info.labels,
            role=info.role,
            modalities=info.modalities,
            media_patches=info.media_patches,
            kv_cache_dtype=info.kv_cache_dtype,
        )

    async def Abort(  # noqa: N802
        self, request: control_pb2.AbortRequest, context: Context
    ) -> control_pb2.AbortResponse:
        if not request.request_id:
            raise invalid("request_id is empty: name the request to abort.", "request_id")
        return control_pb2.AbortResponse(found=await self._service().abort(request.request_id))


def generic_handler(servicer: Inference | Control | Transfer, limits: Limits | None = None) -> grpc.GenericRpcHandler:
    """Registers a servicer's methods, with messages parsed here instead of inside grpc.

    Args:
        limits: on a message's parts, and on how long a client may take nothing of a stream that has more for it (then its call
            ends, and with it what it asked for); None for the defaults.

    The stubs' own registration lets grpc parse, which answers INTERNAL to a message that does not parse (invalid
    UTF-8, say); that is the client's fault and must be INVALID_ARGUMENT.
    """
    descriptor = servicer.descriptor
    handlers = {
        method.name: _method_handler(method, getattr(servicer, method.name), limits or Limits())
        for method in descriptor.methods
    }
    return grpc.method_handlers_generic_handler(descriptor.full_name, handlers)


def _method_handler(method: MethodDescriptor, function: Callable[..., Any], limits: Limits) -> grpc.RpcMethodHandler:
    kind = message_factory.GetMessageClass(method.input_type)
    if method.server_streaming:
        stream = _streaming(kind, function, method.name, limits)
        return grpc.unary_stream_rpc_method_handler(stream, None, _serialize)  # type: ignore[arg-type]
    return grpc.unary_unary_rpc_method_handler(_unary(kind, function, method.name, limits), None, _serialize)  # type: ignore[arg-type]


def _serialize(message: Message) -> bytes:
    return message.SerializeToString()


async def _parse(kind: type[Message], data: bytes, limits: Limits) -> Message:
    if len(data) > LARGE_BYTES:
        memory.note_peak(16 * len(data))
        return await asyncio.get_running_loop().run_in_executor(_parsing, _parse_now, kind, data, limits)
    return _parse_now(kind, data, limits)


def _parse_now(kind: type[Message], data: bytes, limits: Limits) -> Message:
    if len(data) > LARGE_BYTES:
        check_wire(data, kind.DESCRIPTOR, limits)
    try:
        message = kind.FromString(data)
    except DecodeError:
        raise invalid(
            f"The request is not a valid {kind.DESCRIPTOR.full_name}: strings must be UTF-8, and the message whole."
        ) from None
    check_counts(message, limits)
    return message


_parsing = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-message")


def _unary(
    kind: type[Message], function: Callable[[Any, Context], Awaitable[Message]], name: str, limits: Limits
) -> Callable[[bytes, Context], Awaitable[Message]]:
    async def handle(data: bytes, context: Context) -> Message:
        began = begin_call(context)
        try:
            reply = await function(await _parse(kind, data, limits), context)
            await context.send_initial_metadata(id_metadata())
            return reply
        except Exception as error:
            raise await _abort(context, error) from error
        finally:
            end_call(context, name, began)

    return handle


def _streaming(
    kind: type[Message],
    function: Callable[[Any, Context], AsyncIterator[Message]],
    name: str,
    limits: Limits,
) -> Callable[[bytes, Context], Awaitable[None]]:
    async def handle(data: bytes, context: Context) -> None:
        # A dropped call cancels this coroutine wherever it waits, in `write` too: only closing the stream there and
        # then lets the engine free its pages at once.
        began, first = begin_call(context), True
        watch = StallWatch(limits.stalled_reader_s)
        try:
            request = await _parse(kind, data, limits)
            async with contextlib.aclosing(function(request, context)) as messages:  # type: ignore[type-var]
                async for message in messages:
                    if first:
                        await context.send_initial_metadata(id_metadata())
                        first = False
                    await watch.write(context.write, message)
        except ReaderStalledError as error:
            stalled = RequestError(ErrorKind.RESOURCE_EXHAUSTED, "The client reads nothing of its stream.")
            raise await _abort(context, stalled) from error
        except Exception as error:
            raise await _abort(context, error) from error
        finally:
            watch.close()
            end_call(context, name, began)

    return handle


async def _abort(context: Context, error: Exception) -> Exception:
    """Ends the call with the error's status. Does not return: `context.abort` raises."""
    if isinstance(error, grpc.aio.AbortError | grpc.RpcError):
        raise error
    if not isinstance(error, RequestError):
        log.error("a call failed", exc_info=error)
        error = RequestError(ErrorKind.INTERNAL, "The server failed to handle the request; its log says why.")
    status, message, trailing = status_of(error)
    await context.abort(status, message, (*trailing, *id_metadata()))
    return error
