"""Runs a gateway: listens at once, waits for its engines, serves from those that are there."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving import event_loop
from serving.access import Access, shared
from serving.access.flags import access_of, http_options, limit_changes, tls_of, warnings_for
from serving.errors import RequestError
from serving.gateway.flags import discovery_of, parse, prefill_discovery_of, router_of, target_tls
from serving.gateway.page_index import follow
from serving.gateway.pool import Member, Pool
from serving.gateway.prefills import Prefills
from serving.storage import Store
from serving.storage.flags import store_of

if TYPE_CHECKING:
    from serving.frontends.grpc.client import RemoteEngineClient
    from serving.service import TextService


class Gateway:
    """One run, from flags to exit status."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._first = asyncio.Event()  # an engine is there
        self._pool: Pool | None = None
        self._service: TextService | None = None
        self._following: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._prefills = Prefills(args.prefill_policy, args.prefill_min_tokens)
        self._access = Access()
        self._redis: Any = None
        self._picker: Any = None
        self._store: Store | None = None
        self._source: Any = None
        self._seen: set[str] = set()  # what engines read of which it was looked whether this gateway can

    async def run(self) -> int:
        """Returns the exit status: 0 after a signal, 1 when it cannot serve."""
        from serving.frontends.http.server import serve_app
        from serving.gateway.connecting import Connector
        from serving.gateway.waiting import Doorway
        from serving.service import Limits

        args, tls = self._args, tls_of(self._args)
        self._access = await self._shared_access()
        for line in warnings_for(args.host, self._access, tls):
            say(line)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        discovery = discovery_of(args)
        names = discovery.sentence()
        grpc_server = None
        try:
            self._store = store_of(args)
            engines = Connector(
                discovery, self._on_ready, args.target_api_key, target_tls(args), say,
                on_gone=self._on_gone, look_s=args.target_refresh,
            )  # fmt: skip
            helpers = Connector(
                prefill_discovery_of(args), self._on_helper, args.target_api_key, target_tls(args), say,
                on_gone=self._prefills.remove, look_s=args.target_refresh,
            )  # fmt: skip
            door = Doorway(engines.sentence)
            http = await serve_app(door, Limits(), host=args.host, port=args.port, tls=tls)
            grpc_server = await self._grpc(tls)
        except (ValueError, OSError) as error:
            say(f"error: {error}")
            return 1
        await engines.start()
        await helpers.start()
        try:
            say(f"listening at {http.url}; waiting for {names}")
            if not await self._wait_for_first(engines):
                return 0 if self._stop.is_set() else 1
            door.app = await self._application()
            if grpc_server is not None and self._service is not None:
                await grpc_server.serve(self._service)
            await self._start_picker(tls)
            say(f"ready at {http.url}, serving {self._info().model_id} from {names}")
            await self._stop.wait()
            await self._drain()
        except (ValueError, OSError, RequestError) as error:
            say(f"error: {error}")
            return 1
        finally:
            for server in (grpc_server, self._picker):
                if server is not None:
                    await server.stop(1.0)
            await http.stop(1.0)
            tasks = [*self._following.values(), *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if self._store is not None:
                await self._store.stop()
            await engines.close()
            await helpers.close()
            if self._redis is not None:
                await shared.close(self._redis)
        return 0

    async def _shared_access(self) -> Access:
        """The keys of the flags, and those in Redis where they are asked for."""
        access = access_of(self._args)
        if self._args.redis_url is None:
            return access
        self._redis = shared.connect(self._args.redis_url)
        if not self._args.redis_keys:
            return access
        keys = shared.SharedKeys(access.keys, self._redis)
        await keys.read()
        self._tasks.add(asyncio.create_task(keys.follow()))
        return dataclasses.replace(access, keys=keys)

    def _on_ready(self, name: str, client: RemoteEngineClient) -> None:
        self._take(name, client)
        if self._args.kv_events and self._args.policy == "cache":
            assert self._pool is not None
            following = asyncio.create_task(follow(name, client, self._pool.router))
            self._following[name] = following

    def _on_helper(self, name: str, client: RemoteEngineClient) -> None:
        self._prefills.add(name, client, self._pool.info().model_id if self._pool is not None else None)

    def _on_gone(self, name: str) -> Member | None:
        if (following := self._following.pop(name, None)) is not None:
            following.cancel()
        return self._pool.remove(name) if self._pool is not None else None

    def _take(self, name: str, client: RemoteEngineClient) -> None:
        if self._pool is None:
            self._pool = Pool([client], router_of(self._args), [name])
            self._pool.objectives = dict(self._args.objective)
            self._pool.sticky_tenants = self._args.sticky_tenants
            self._pool.prefills = self._prefills
            self._first.set()
            return
        self._pool.add(client, name)
        self._look_at_senses()

    def _look_at_senses(self) -> None:
        """The first engine that reads images or sounds may have come after others that read none."""
        if self._service is None or self._service.media is not None or set(self._info().modalities) <= self._seen:
            return
        self._seen = set(self._info().modalities)
        task = asyncio.create_task(self._begin_to_read(self._service))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin_to_read(self, service: TextService) -> None:
        from serving.gateway.media import media_of

        try:
            service.media = await asyncio.to_thread(media_of, self._args, self._info(), self._source)
        except (ValueError, OSError) as error:
            say(f"images and sounds are not read: {error}")

    async def _grpc(self, tls: Any) -> Any:
        """The gRPC server, listening; None where none is asked for."""
        from serving.frontends.grpc.server import GrpcServer
        from serving.gateway.asking import AskedByMetadata
        from serving.service import Limits

        args = self._args
        if args.grpc_port is None:
            return None
        server = GrpcServer(
            args.host, args.grpc_port, Limits(), access=self._access, tls=tls,
            interceptors=(AskedByMetadata(args.session_header),),
        )  # fmt: skip
        port = await server.start()
        say(f"listening at {args.host}:{port} (gRPC)")
        return server

    async def _start_picker(self, tls: Any) -> None:
        if self._args.endpoint_picker_port is None:
            return
        from serving.gateway.picker import EndpointPicker, serve_picker

        assert self._service is not None and self._pool is not None
        picker = EndpointPicker(self._service, self._pool, self._args.target_http_port)
        host = self._args.host
        self._picker, port = await serve_picker(picker, host, self._args.endpoint_picker_port, tls)
        say(f"picking endpoints at {host}:{port} (gRPC, external processing)")

    async def _wait_for_first(self, engines: Any) -> bool:
        """Whether there is an engine; False where it was told to stop, has waited for long enough, or every engine refused."""
        waits = [asyncio.create_task(work) for work in (self._first.wait(), self._stop.wait(), engines.settled())]
        try:
            timeout = self._args.connect_timeout or None
            await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
        if waits[2].done() and (error := waits[2].exception()) is not None:
            raise error
        if self._first.is_set() or self._stop.is_set():
            return self._first.is_set() and not self._stop.is_set()
        say(f"error: {engines.sentence()}")
        return False

    def _info(self) -> Any:
        assert self._pool is not None
        return self._pool.info()

    async def _application(self) -> Any:
        """The OpenAI API over the pool."""
        from models.loading.source import resolve
        from serving.boot.startup import load_text_side
        from serving.frontends.app import create_app, rehearse
        from serving.frontends.grpc.client import RemoteGrammars
        from serving.gateway.asking import AskedByHeaders
        from serving.gateway.media import media_of
        from serving.gateway.metrics import GatewayMetrics
        from serving.gateway.speech import RemoteSpeech
        from serving.metrics import MeteredClient
        from serving.service import Limits, TextService

        args, info = self._args, self._info()
        source = await asyncio.to_thread(resolve, args.model, progress=True)
        side = await asyncio.to_thread(load_text_side, source, args.chat_template)
        self._source, self._seen = source, set(info.modalities)
        media = await asyncio.to_thread(media_of, args, info, source)
        if side.tokenizer.vocab_size > info.vocab_size:
            raise ValueError(
                f"The tokenizer has {side.tokenizer.vocab_size} tokens, the served model {info.model_id} "
                f"{info.vocab_size}. Name the model that the engines serve with --model."
            )
        assert self._pool is not None
        client = MeteredClient(self._pool)
        client.metrics.add(GatewayMetrics(self._pool))
        self._service = TextService(
            client,
            side.tokenizer,
            side.chat_template,
            model_id=info.model_id,
            grammar_compiler=RemoteGrammars(),  # type: ignore[arg-type]
            tool_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            media=media,
            limits=Limits.for_model(info.max_model_len, **limit_changes(args)),
            speech=RemoteSpeech(self._pool) if "transcribe" in info.tasks else None,
            rates=shared.SharedMeter(self._redis, args.requests_per_minute) if self._redis is not None else None,
        )
        self._look_at_senses()
        app = create_app(self._service, store=self._store, access=self._access, **http_options(args))
        await rehearse(app)
        return AskedByHeaders(app, args.session_header)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    async def _drain(self) -> None:
        """Takes no more requests, waits for those that run, and tells their clients where they are cut."""
        service = self._service
        if service is None:
            return
        service.start_draining()
        waits = [
            asyncio.create_task(work) for work in (service.wait_idle(self._args.drain_timeout), self._stop_now.wait())
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if service.num_live:
            say(f"ending {service.num_live} requests that still run")
        await service.abort_all()


def say(line: str) -> None:
    """One line for whoever started it."""
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a gateway until SIGTERM. Returns the exit status."""
    from serving.metrics.logs import setup_logging

    args = parse(argv)
    setup_logging(args.log_format, args.log_level)
    return event_loop.run(_run(args))


async def _run(args: argparse.Namespace) -> int:
    return await Gateway(args).run()  # made inside the loop: its events belong to it


if __name__ == "__main__":
    sys.exit(main())
