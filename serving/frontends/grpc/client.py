"""An `EngineClient` over our own gRPC: tokens in, tokens out. What a gateway process puts under its TextService."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import grpc
import numpy as np

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc, transfer_pb2, transfer_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from serving.access import ClientTls
from serving.engine.api.client import ClassifyingClient, EmbeddingClient, EngineClient, ScoringClient
from serving.engine.api.constraint import TokenConstraint
from serving.engine.api.sampling_params import StructuredOutputs
from serving.engine.api.types import (
    EngineInfo,
    EngineOutput,
    EngineRequest,
    EngineStats,
    RequestTimes,
    TokenLogprobs,
    TokenPair,
)
from serving.errors import ErrorKind, RequestError
from serving.frontends.grpc import convert, figures
from serving.frontends.grpc.context import outgoing_metadata
from serving.frontends.grpc.errors import error_of
from serving.frontends.grpc.speech import request_of, transcript_from
from serving.frontends.grpc.watching import HealthWatch, RemoteAdapters
from serving.service.speech.transcripts import TranscribeInput, Transcript

log = logging.getLogger(__name__)
INFO_TIMEOUT_S = 5.0
MAX_LATE = 6
"""A server that is gone refuses the connection; one that is busy (thousands of streams that begin at once) answers late. Only
after so many late answers in a row it counts as gone too."""

OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # After a lost connection the first tries come fast; by default gRPC would come to wait two minutes for a restarted one.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 3_000),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class RemoteEngineClient(EngineClient):
    """One jaxserve server, as an engine. Make one with `connect`; belongs to the event loop that made it.

    Stop strings, `n` and text stay on this side (the TextService's): the wire carries tokens. Grammars go by their
    source (`RemoteGrammars`): the server compiles them. `stats` is as old as `poll_s`.
    """

    def __init__(self, channel: grpc.aio.Channel, info: EngineInfo, eos_token_ids: tuple[int, ...]) -> None:
        self._channel = channel
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self._control = control_pb2_grpc.ControlStub(channel)
        self._transfer = transfer_pb2_grpc.TransferStub(channel)
        self._info = info
        self.eos_token_ids = eos_token_ids
        self._stats = EngineStats()
        self._healthy = True
        self._adapters: RemoteAdapters | None = None
        self._health = HealthWatch(channel)
        self._poller: asyncio.Task[None] | None = None
        self._uptime_s = 0.0
        self._on_stats: Callable[[], None] | None = None
        self._on_restart: Callable[[], None] | None = None

    @classmethod
    async def connect(
        cls,
        target: str,
        *,
        timeout_s: float = 30.0,
        poll_s: float = 1.0,
        api_key: str | None = None,
        tls: ClientTls | None = None,
        tls_name: str | None = None,
    ) -> RemoteEngineClient:
        """Connects to `host:port` and learns what it serves.

        Args:
            api_key: sent with every call.
            tls: how to reach a server that has TLS; None for one that has not.
            tls_name: whose certificate it must show; None: that of the target's host.
        Raises:
            ValueError: a TLS file that cannot be read.
            RequestError: UNAVAILABLE when it cannot be reached within `timeout_s` seconds.
        """
        channel = _channel(target, api_key, tls, tls_name)
        control = control_pb2_grpc.ControlStub(channel)
        try:
            wait = {"timeout": timeout_s, "wait_for_ready": True}
            model = await control.GetModelInfo(control_pb2.GetModelInfoRequest(), **wait)
            server = await control.GetServerInfo(control_pb2.GetServerInfoRequest(), **wait)
        except grpc.aio.AioRpcError as error:
            await channel.close()
            raise error_of(error, quiet=True) from error
        client = cls(channel, _info(model, server), tuple(model.eos_token_ids))
        client._note(server)
        client._poller = asyncio.create_task(client._poll(poll_s))
        client._health.start()
        return client

    def watch(self, on_stats: Callable[[], None], on_restart: Callable[[], None]) -> None:
        """Has somebody told, on the event loop, when the server has told its load, and when it has been started anew."""
        self._on_stats, self._on_restart = on_stats, on_restart

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """See EngineClient.generate. Closing the iterator cancels the call, and with it the request there."""
        adapter = self._name_of(request.adapter)
        call = self._inference.Generate(_wire_request(request, adapter), metadata=outgoing_metadata())
        prompt_tokens = len(request.prompt_token_ids)
        first_token = 0.0
        try:
            async for message in call:
                now = time.monotonic()
                first_token = first_token or now
                yield _output(request, message, prompt_tokens, first_token, now)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()  # does nothing to a call that is over

    async def embed(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        pooling: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> np.ndarray:
        """See EmbeddingClient.embed."""
        wire = pb.EmbedRequest(
            inputs=[pb.EmbedInput(token_ids=pb.TokenIds(ids=token_ids))],
            request_id=request_id,
            priority=priority,
            pooling=pooling or "",
            model=self._name_of(adapter),
        )
        try:
            reply = await self._inference.Embed(wire, metadata=outgoing_metadata())
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return np.array(reply.embeddings[0].values, np.float32)

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """See ScoringClient.score."""
        tokens = [pb.TokenPair(token_ids=pair.token_ids, segment_ids=pair.segment_ids) for pair in pairs]
        wire = pb.ScoreRequest(
            pairs=[pb.ScorePair(tokens=pair) for pair in tokens], request_id=request_id, priority=priority
        )
        try:
            reply = await self._inference.Score(wire, metadata=outgoing_metadata())
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return np.array(reply.scores, np.float32)

    async def classify(
        self, request_id: str, token_ids: Sequence[int], *, raw: bool = False, priority: int = 0
    ) -> np.ndarray:
        """See ClassifyingClient.classify."""
        wire = pb.ClassifyRequest(
            inputs=[pb.EmbedInput(token_ids=pb.TokenIds(ids=token_ids))],
            request_id=request_id,
            priority=priority,
            raw=raw,
        )
        try:
            reply = await self._inference.Classify(wire, metadata=outgoing_metadata())
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        return np.array(reply.classifications[0].values, np.float32)

    async def transcribe(self, given: TranscribeInput, tell: Callable[[str], None] | None = None) -> Transcript:
        """What a server for speech says of a sound.

        Args:
            tell: is given the text as it becomes certain.
        """
        call = self._inference.Transcribe(request_of(given, tell is not None), metadata=outgoing_metadata())
        try:
            async for message in call:
                if message.HasField("transcript"):
                    return transcript_from(message.transcript, given.task)
                if tell is not None:
                    tell(message.delta)
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error
        finally:
            call.cancel()  # does nothing to a call that is over
        raise RequestError(ErrorKind.UNAVAILABLE, "The engine's answer ended before its transcript.")

    async def page_batches(
        self, log_id: str = "", after: int | None = None
    ) -> AsyncGenerator[control_pb2.WatchPagesResponse, None]:
        """What the server's prefix cache holds and how it changes, until the iterator is closed; see WatchPagesRequest.

        Raises:
            RequestError: UNIMPLEMENTED where it tells nothing, PERMISSION_DENIED, UNAVAILABLE.
        """
        call = self._control.WatchPages(control_pb2.WatchPagesRequest(log_id=log_id, after=after))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise error_of(error, quiet=True) from error
        finally:
            call.cancel()

    async def release(self, ticket: str) -> None:
        """Tells the server that nobody will fetch the pages that it keeps under a ticket, or was to keep."""
        try:
            await self._transfer.Release(transfer_pb2.ReleaseRequest(ticket=ticket), timeout=INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise error_of(error, quiet=True) from error

    async def abort(self, request_id: str) -> bool:
        """See EngineClient.abort."""
        try:
            return (await self._control.Abort(control_pb2.AbortRequest(request_id=request_id))).found
        except grpc.aio.AioRpcError as error:
            raise error_of(error) from error

    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        return self._stats

    @property
    def embedder(self) -> EmbeddingClient:
        """Itself; whether the server's model embeds says `info().tasks`."""
        return self

    @property
    def scorer(self) -> ScoringClient:
        """Itself; whether the server's model scores says `info().tasks`."""
        return self

    @property
    def classifier(self) -> ClassifyingClient:
        """Itself; whether the server's model classifies says `info().tasks`."""
        return self

    @property
    def adapters(self) -> RemoteAdapters | None:
        """What the server has loaded; None where it takes none."""
        return self._adapters

    def _name_of(self, digest: str | None) -> str:
        """What the server calls a request's adapter; "" for none."""
        return self._adapters.name_of(digest) if digest is not None and self._adapters is not None else ""

    @property
    def healthy(self) -> bool:
        """Whether it answered when last asked, and takes requests: its health service says so at once."""
        return self._healthy and self._health.serving

    async def close(self) -> None:
        """Ends the connection; live requests are aborted by the server."""
        if self._poller is not None:
            self._poller.cancel()
            await self._health.close()
            with contextlib.suppress(asyncio.CancelledError):
                await self._poller
        await self._channel.close()

    async def _poll(self, every_s: float) -> None:
        late = 0
        while True:
            await asyncio.sleep(every_s)
            try:
                request = control_pb2.GetServerInfoRequest()
                server = await self._control.GetServerInfo(request, timeout=INFO_TIMEOUT_S)
                if server.uptime_s < self._uptime_s and not await self._same_model():
                    continue
                self._note(server)
                late = 0
            except grpc.aio.AioRpcError as error:
                late += 1
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and late < MAX_LATE:
                    continue
                if self._healthy:
                    log.warning("the engine does not answer: %s", error.details())
                self._healthy = False

    async def _same_model(self) -> bool:
        """Whether a server that was started anew serves what it did. One that does not is left alone."""
        model = await self._control.GetModelInfo(control_pb2.GetModelInfoRequest(), timeout=INFO_TIMEOUT_S)
        if (model.id, model.vocab_size) == (self._info.model_id, self._info.vocab_size):
            return True
        if self._healthy:
            log.warning("the engine serves %s now, not %s: it gets no requests", model.id, self._info.model_id)
        self._healthy = False
        return False

    def _note(self, server: control_pb2.GetServerInfoResponse) -> None:
        self._healthy = not server.draining
        restarted, self._uptime_s = server.uptime_s < self._uptime_s, server.uptime_s
        self._adapters = RemoteAdapters(server.adapters) if server.takes_adapters else None
        if restarted and self._on_restart is not None:
            self._on_restart()
        self._stats = EngineStats(
            num_running=server.num_running,
            num_waiting=server.num_waiting,
            num_pages_free=server.num_pages_free,
            num_pages_total=server.num_pages_total,
            num_preemptions=server.num_preemptions,
            prompt_tokens=server.prompt_tokens,
            generation_tokens=server.generation_tokens,
            num_steps=server.num_steps,
            num_recompilations=server.num_recompilations,
            prefix_queries=server.prefix_queries,
            prefix_hits=server.prefix_hits,
            num_scheduled_tokens_total=server.num_scheduled_tokens,
            num_bucket_tokens_total=server.num_bucket_tokens,
            host_time_s_total=server.host_time_s,
            device_wait_time_s_total=server.device_wait_time_s,
            num_drafts=server.num_drafts,
            num_draft_tokens=server.num_draft_tokens,
            num_accepted_tokens=server.num_accepted_tokens,
            accepted_per_pos=tuple(server.accepted_per_pos) or None,
            media_queries=server.media_queries,
            media_hits=server.media_hits,
            media_time_s_total=server.media_time_s,
            transfers=figures.stats_from(server.transfers) if server.HasField("transfers") else None,
        )
        if self._on_stats is not None:
            self._on_stats()


class _Key:
    """Adds the key to each call. Not as call credentials, which gRPC takes over TLS alone: behind a service mesh, say,
    the connection is private without."""

    def __init__(self, api_key: str) -> None:
        self._header = ("authorization", f"Bearer {api_key}")

    def add_to(self, details: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()))
        metadata.add(*self._header)
        return details._replace(metadata=metadata)


class _KeyOfUnary(_Key, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_to(client_call_details), request)


class _KeyOfStream(_Key, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(self.add_to(client_call_details), request)


def _channel(target: str, api_key: str | None, tls: ClientTls | None, tls_name: str | None = None) -> grpc.aio.Channel:
    # Two: grpc.aio takes an interceptor for one shape of call, whatever else it could do.
    interceptors: Any = [_KeyOfUnary(api_key), _KeyOfStream(api_key)] if api_key else None
    if tls is None:
        return grpc.aio.insecure_channel(target, options=OPTIONS, interceptors=interceptors)
    credentials = grpc.ssl_channel_credentials(**tls.grpc_arguments())
    named = (("grpc.ssl_target_name_override", tls_name),) if tls_name else ()
    return grpc.aio.secure_channel(target, credentials, options=(*OPTIONS, *named), interceptors=interceptors)


class RemoteGrammars:
    """Stands for a grammar compiler where the engine is remote: the server behind compiles `structured_outputs`."""

    def compile(self, grammar: StructuredOutputs) -> Callable[[], TokenConstraint | None]:
        """A factory of nothing: the request carries the grammar's source."""
        return lambda: None


def _wire_request(request: EngineRequest, model: str) -> pb.GenerateRequest:
    params = dataclasses.replace(request.params, stop=None, detokenize=False)
    wire = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=request.prompt_token_ids),
        sampling_params=convert.params_to(params),
        model=model,
        request_id=request.request_id,
        priority=request.priority,
        cache_salt=request.cache_salt or "",
        tenant=request.tenant or "",
        whole=request.whole,
    )
    if request.transfer is not None:
        wire.kv_transfer.CopyFrom(convert.transfer_to(request.transfer))
    if request.media is not None:
        convert.put_media(wire, request.media)
    now = time.monotonic()
    # A deadline that has passed is still said: the server's answer is then the right one.
    if request.deadline is not None:
        wire.timeout_s = max(request.deadline - now, 1e-3)
    if request.ttft_deadline is not None:
        wire.ttft_timeout_s = max(request.ttft_deadline - now, 1e-3)
    return wire


def _output(
    request: EngineRequest, message: pb.GenerateResponse, prompt_tokens: int, first_token: float, now: float
) -> EngineOutput:
    finish = convert.FINISH_REASON_OF.get(message.finish_reason)
    stop = message.stop_token_id if message.WhichOneof("stop_reason") == "stop_token_id" else None
    scheduled = request.arrival_time + message.usage.queue_s if finish else 0.0
    return EngineOutput(
        request_id=request.request_id,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_logprobs, message.logprobs)) if message.logprobs else None,
        prompt_logprobs=(
            tuple(_logprobs(e) if e.HasField("logprob") else None for e in message.prompt_logprobs)
            if message.prompt_logprobs
            else None
        ),
        finish_reason=finish,
        stop_reason=stop,
        num_prompt_tokens=prompt_tokens,
        num_cached_tokens=message.usage.cached_tokens,
        accepted_drafts=message.usage.accepted_drafts,
        rejected_drafts=message.usage.rejected_drafts,
        times=RequestTimes(request.arrival_time, scheduled, first_token, now if finish else 0.0),
        transfer=convert.transfer_from(message.kv_transfer) if message.HasField("kv_transfer") else None,
    )


def _logprobs(entry: pb.TokenLogprob) -> TokenLogprobs:
    top = tuple((e.token_id, e.logprob) for e in entry.top)
    return TokenLogprobs(entry.token_id, entry.logprob, entry.rank, top)


def _info(model: control_pb2.GetModelInfoResponse, server: control_pb2.GetServerInfoResponse) -> EngineInfo:
    return EngineInfo(
        model_id=model.id,
        architecture=model.architecture,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        max_num_seqs=model.max_num_seqs,
        max_num_batched_tokens=model.max_num_batched_tokens,
        page_size=model.page_size,
        num_pages=model.num_pages,
        dtype=model.dtype,
        quantization=model.quantization or None,
        mesh=server.mesh,
        platform=server.platform,
        version=server.version,
        num_parameters=model.num_parameters,
        tasks=tuple(model.tasks),
        pooling=model.pooling,
        prompts=tuple(sorted(model.prompts.items())),
        default_prompt=model.default_prompt,
        labels=tuple(model.labels),
        role=model.role,
        modalities=tuple(model.modalities),
        media_patches=model.media_patches,
        kv_cache_dtype=model.kv_cache_dtype,
    )
