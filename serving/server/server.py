"""One run of the server, from flags to exit status."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from serving import memory
from serving.access.flags import access_of, http_options, limit_changes, tls_of, warnings_for
from serving.boot.engine_flags import in_flags
from serving.boot.flags import read_models_file
from serving.boot.lora_modules import default_loras, lora_folder, resolvers_of
from serving.engine.api.client import Where
from serving.engine.api.config import EngineConfig
from serving.errors import RequestError
from serving.metrics.tracing import Tracing
from serving.reliability.notify import notify
from serving.server.guard import Guard
from serving.server.ports import kv_address, listen_grpc, take_http
from serving.server.starting import import_front_ends, start_in_thread
from serving.service.adapter_control import check_name
from serving.storage import Store
from serving.storage.flags import store_of

if TYPE_CHECKING:
    from serving.boot.start import AnyEngine
    from serving.boot.startup import Started
    from serving.fleet.start import FleetEngine, StartedFleet
    from serving.frontends.grpc.server import GrpcServer
    from serving.service import Served, TextService

log = logging.getLogger("serving")

EXIT_FAILED = 1

LAST_WORDS_S = 0.5
"""What clients' connections get to carry their errors out, when the engine has died."""

WATCH_S = 0.25  # how often to look whether the engine lives


def _place(service: TextService) -> str:
    """Where a model is that shares the server, behind its name."""
    residence = service.client.residence
    return "" if residence is None else f": {residence.where.value}"


class Server:
    """One run of the server, from flags to exit status."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig, tracing: Tracing | None = None) -> None:
        self._args = args
        self._config = config
        self._tracing = tracing
        self._access = access_of(args)
        self._resolvers = resolvers_of(args)
        self._tls = tls_of(args)
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._signal = 0
        self._http: Any = None
        self._store: Store | None = None
        self._http_socket: socket.socket | None = None
        self._guard = Guard(args, self._say)
        self._lost = asyncio.Event()
        self._loss = ""
        self._engine: AnyEngine | FleetEngine | None = None

    async def run(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 when start or engine failed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        for line in warnings_for(self._args.host, self._access, self._tls):
            print(line, file=sys.stderr, flush=True)
        try:
            self._store = None if self._args.no_http else store_of(self._args)
            self._http_socket = take_http(self._args, self._say)
            # Begins with imports and headers: a taken gRPC port is told before any weight is read all the same.
            starting = start_in_thread(self._starter(), self._say, self._on_loss)
            grpc_server = await listen_grpc(self._args, self._access, self._tls)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        except ValueError as error:
            print(f"error: {in_flags(str(error), vars(self._args).keys())}", file=sys.stderr)
            return EXIT_FAILED
        self._say(f"listening for gRPC on {self._args.host}:{grpc_server.port}; loading the model")
        preloading = asyncio.create_task(asyncio.to_thread(import_front_ends, not self._args.no_http))
        asked = asyncio.create_task(self._stop.wait())
        lost = asyncio.create_task(self._lost.wait())
        await asyncio.wait({starting, asked, lost}, return_when=asyncio.FIRST_COMPLETED)
        if lost.done():
            print(f"error: {self._loss}", file=sys.stderr)
            return EXIT_FAILED
        if not starting.done():
            self._say("stopped before it was ready")
            return 128 + self._signal
        try:
            started: Started | StartedFleet = starting.result()
        except (ValueError, OSError) as error:
            print(f"error: {in_flags(str(error), vars(self._args).keys())}", file=sys.stderr)
            return EXIT_FAILED
        await preloading
        started.watch(self._guard.watch)
        service = started.service(
            served_names=self._args.served_model_name,
            tracing=self._tracing,
            limit_changes=limit_changes(self._args),
            tool_parser=self._args.tool_call_parser,
            reasoning_parser=self._args.reasoning_parser,
        )
        if not await self._serve(grpc_server, service):
            return EXIT_FAILED
        return await self._until_stopped(started, grpc_server, service)

    # -- start -------------------------------------------------------------------------------------------------------

    def _starter(self) -> Callable[..., Any]:
        """What starts the engine, or several of them."""
        args, config = self._args, self._config
        if not args.entries:
            from serving.boot import startup

            return functools.partial(startup.start, config)
        from serving.fleet.start import FleetOptions, start_fleet

        file = None if args.models is None else read_models_file(args.models)
        options = FleetOptions(args.models_memory or (file and file.memory), args.model_wait, args.model_turn)
        return lambda *, say, on_loss: start_fleet(args.entries, options, say=say)

    async def _load_adapters(self, service: Served) -> bool:
        """Loads what `--lora-modules` names, and a file of models for those that are loaded; one that cannot be served ends the
        start."""
        by_sense = default_loras(self._config)
        wanted = [(service.first, given) for given in (*self._args.lora_modules, *by_sense)]
        service.first.adapters.by_sense = {given.lora_name: given.lora_name for given in by_sense}
        for entry in self._args.entries:
            one = next(found for found in service.services if found.model_id == entry.name)
            if one.client.residence is not None and one.client.residence.where is Where.LOADED:
                wanted += [(one, given) for given in entry.lora_modules]
        for one, given in wanted:
            try:
                check_name(given.lora_name, one)
                info = await asyncio.to_thread(
                    one.adapters.load, given.lora_name, given.lora_path, tenants=given.tenants
                )
            except (ValueError, OSError, RequestError) as error:
                print(f"error: lora_modules: {error}", file=sys.stderr)
                return False
            self._say(f"adapter {info.name}: {info.num_matrices} matrices of rank {info.rank} at most")
        return True

    async def _serve(self, grpc_server: GrpcServer, service: Served) -> bool:
        if not await self._load_adapters(service):
            return False
        service.first.adapters.resolvers = (*self._resolvers, *service.first.adapters.resolvers)
        service.first.kv_address = kv_address(self._config, self._args.host, grpc_server.port)
        await service.rehearse()
        if not await self._serve_http(service):
            return False
        memory.end_start()
        await grpc_server.serve(service)
        for one in service.services:
            self._say(f"serving {one.model_id} (names: {', '.join(map(repr, one.model_names))}){_place(one)}")
        where = f"gRPC {self._args.host}:{grpc_server.port}"
        if self._http is None:
            self._say(f"ready at {where}")
        else:
            self._say(f"ready at {where}, {self._http.url}")
            self._say(f"open {self._http.url}/ in a browser; clients of OpenAI's API use {self._http.url}/v1")
        notify("READY=1")
        return True

    async def _serve_http(self, service: Served) -> bool:
        """Starts the HTTP front end on the port that was taken at the beginning."""
        if self._http_socket is None:
            return True
        from serving.frontends.app import serve_http

        try:
            self._http = await serve_http(
                service,
                host=self._args.host,
                sock=self._http_socket,
                tls=self._tls,
                access=self._access,
                store=self._store,
                lora_folder=lora_folder(self._args),
                **http_options(self._args),
            )
        except OSError as error:  # somebody else has begun to listen there meanwhile
            print(f"error: cannot listen for HTTP ({error.strerror or error}).", file=sys.stderr)
            return False
        return True

    # -- stop --------------------------------------------------------------------------------------------------------

    async def _until_stopped(self, started: Started | StartedFleet, grpc_server: GrpcServer, service: Served) -> int:
        """Serves; then drains and stops."""
        engine = self._engine = started.engine
        if self._lost.is_set():
            self._on_loss(self._loss)
        while engine.failure is None and not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), WATCH_S)
        if engine.failure is None:
            notify("STOPPING=1")
            await self._drain(grpc_server, service)
        if engine.failure is not None:
            return await self._give_up(engine.failure, started, grpc_server)
        await service.abort_all()
        if self._http is not None:
            await self._http.stop(1.0)  # what cut replies end with still has to go out
        if self._store is not None:
            await self._store.stop()
        await grpc_server.stop(1.0)
        await asyncio.to_thread(started.shutdown)
        self._say("stopped")
        return 128 + self._signal if self._stop_now.is_set() else 0

    async def _give_up(self, failure: BaseException, started: Started | StartedFleet, grpc_server: GrpcServer) -> int:
        """Ends a server whose engine is dead: whoever waits for it has been told so, and gets a moment to hear it."""
        if not self._loss:
            log.error("the engine died", exc_info=failure)
        await grpc_server.drain()
        self._guard.report(started.engine, failure)
        await asyncio.sleep(LAST_WORDS_S)
        await grpc_server.stop(LAST_WORDS_S)
        if self._loss:  # the loss of a process may be known later than what it caused
            print(f"error: {self._loss}", file=sys.stderr)
        elif started.leader is not None:
            await asyncio.to_thread(started.leader.stop, "the engine of process 0 died.")
        return EXIT_FAILED

    async def _drain(self, grpc_server: GrpcServer, service: Served) -> None:
        timeout = self._args.drain_timeout
        self._say(
            f"{signal.Signals(self._signal).name}: refusing new requests, waiting up to {timeout:g} s for "
            f"{service.num_live} running; again to stop at once"
        )
        service.start_draining()
        await grpc_server.drain()
        idle = asyncio.create_task(service.wait_idle(timeout))
        now = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait({idle, now}, return_when=asyncio.FIRST_COMPLETED)
        for task in (idle, now):
            task.cancel()
        await asyncio.gather(idle, now, return_exceptions=True)
        if service.num_live:
            self._say(f"ending {service.num_live} requests that still run")

    def _on_loss(self, reason: str) -> None:
        """Another process of the engine is lost, and so is the engine."""
        self._loss = reason
        self._lost.set()
        if self._engine is not None:
            self._engine.declare_dead(ConnectionError(reason))

    def _on_signal(self, number: int) -> None:
        self._signal = number
        if self._stop.is_set():
            self._stop_now.set()
        self._stop.set()

    def _say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {line}", file=sys.stderr, flush=True)
