"""python -m serving.launch: parse flags, start the engine, listen until told to stop."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from serving import event_loop, memory
from serving.access.flags import SECRET_FLAGS, access_of, tls_of, warnings_for
from serving.boot.flags import HTTP_PORT, describe, parse
from serving.engine.api.config import EngineConfig
from serving.metrics.logs import setup_logging
from serving.metrics.tracing import Tracing
from serving.reliability import crash_report
from serving.reliability.faults import FaultyRunner, strike_at_start, wanted
from serving.reliability.notify import notify
from serving.reliability.supervisor import Supervisor
from serving.reliability.watchdog import StalledError, Watchdog

if TYPE_CHECKING:
    from serving.boot.start import AnyEngine
    from serving.boot.startup import Started
    from serving.frontends.grpc.server import GrpcServer
    from serving.service import TextService

log = logging.getLogger("serving")

EXIT_FAILED = 1
EXIT_STALLED = 75
"""Nothing moved any more, and the process had to be ended from its watchdog's thread."""

LAST_WORDS_S = 0.5
"""What clients' connections get to carry their errors out, when the engine has died."""

WATCH_S = 0.25  # how often to look whether the engine lives


class Server:
    """One run of the server, from flags to exit status."""

    def __init__(self, args: argparse.Namespace, config: EngineConfig, tracing: Tracing | None = None) -> None:
        self._args = args
        self._config = config
        self._tracing = tracing
        self._access = access_of(args)
        self._tls = tls_of(args)
        self._began = time.monotonic()
        self._stop = asyncio.Event()
        self._stop_now = asyncio.Event()
        self._signal = 0
        self._http: Any = None
        self._http_at = ""
        self._reported = False
        self._lost = asyncio.Event()
        self._loss = ""
        self._engine: AnyEngine | None = None

    async def run(self) -> int:
        """Returns the exit status: 0 after a stop that was asked for, 1 when start or engine failed."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        starting = _start_in_thread(self._config, self._args, self._say, self._on_loss)
        grpc_server = await self._listen()
        if grpc_server is None:
            return EXIT_FAILED
        # Imports of a second or so, while XLA works and Python is idle.
        preloading = asyncio.create_task(asyncio.to_thread(_import_front_ends, not self._args.no_http))
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
            started: Started = starting.result()
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        await preloading
        self._watch(started)
        service = started.service(
            served_names=self._args.served_model_name,
            tracing=self._tracing,
            requests_per_minute=self._args.requests_per_minute,
            tool_parser=self._args.tool_call_parser,
            reasoning_parser=self._args.reasoning_parser,
        )
        if not await self._serve(grpc_server, service):
            return EXIT_FAILED
        return await self._until_stopped(started, grpc_server, service)

    # -- start -------------------------------------------------------------------------------------------------------

    async def _listen(self) -> GrpcServer | None:
        """Binds the gRPC port before the model is loaded: a taken port is told at once, and health can be asked."""
        from serving.frontends.grpc.server import GrpcServer

        for line in warnings_for(self._args.host, self._access, self._tls):
            print(line, file=sys.stderr, flush=True)
        server = GrpcServer(self._args.host, self._args.grpc_port, access=self._access, tls=self._tls)
        try:
            await server.start()
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return None
        self._say(f"listening for gRPC on {self._args.host}:{server.port}; loading the model")
        return server

    async def _serve(self, grpc_server: GrpcServer, service: TextService) -> bool:
        await service.rehearse()
        if not self._args.no_http and not await self._serve_http(service):
            return False
        memory.end_start()
        await grpc_server.serve(service)
        names = ", ".join(repr(name) for name in service.model_names)
        self._say(f"serving {service.model_id} (names: {names})")
        where = f"gRPC {self._args.host}:{grpc_server.port}" + (f", {self._http_at}" if self._http else "")
        self._say(f"ready at {where}")
        notify("READY=1")
        return True

    async def _serve_http(self, service: TextService) -> bool:
        """Starts the HTTP front end. A taken port is an error only when it was asked for by name."""
        from serving.frontends.openai.server import serve_http

        port = HTTP_PORT if self._args.port is None else self._args.port
        try:
            self._http = await serve_http(
                service,
                host=self._args.host,
                port=port,
                tls=self._tls,
                access=self._access,
                cors_origins=tuple(self._args.allowed_origins),
            )
        except OSError as error:
            reason = f"cannot listen on {self._args.host}:{port} for HTTP ({error.strerror or error})"
            if self._args.port is not None:
                print(f"error: {reason}. Choose another port with --port.", file=sys.stderr)
                return False
            self._say(f"{reason}; going on without. Choose another port with --port")
            return True
        self._http_at = self._http.url
        return True

    # -- stop --------------------------------------------------------------------------------------------------------

    async def _until_stopped(self, started: Started, grpc_server: GrpcServer, service: TextService) -> int:
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
            await self._http.stop(0.0 if self._stop_now.is_set() else 1.0)
        await grpc_server.stop(1.0)
        await asyncio.to_thread(started.shutdown)
        self._say("stopped")
        return 128 + self._signal if self._stop_now.is_set() else 0

    async def _give_up(self, failure: BaseException, started: Started, grpc_server: GrpcServer) -> int:
        """Ends a server whose engine is dead: whoever waits for it has been told so, and gets a moment to hear it."""
        if not self._loss:
            log.error("the engine died", exc_info=failure)
        await grpc_server.drain()
        self._report(started.engine, failure)
        await asyncio.sleep(LAST_WORDS_S)
        await grpc_server.stop(LAST_WORDS_S)
        if self._loss:  # the loss of a process may be known later than what it caused
            print(f"error: {self._loss}", file=sys.stderr)
        elif started.group is not None:
            await asyncio.to_thread(started.group.stop, "the engine of process 0 died.")
        return EXIT_FAILED

    # -- what may go wrong -------------------------------------------------------------------------------------------

    def _watch(self, started: Started) -> None:
        """Puts the watchdog beside a running engine, and the faults that were asked for into it."""
        engine: Any = started.engine
        loop = asyncio.get_running_loop()
        if faults := wanted(self._args.inject_fault):

            def block(seconds: float) -> None:
                loop.call_soon_threadsafe(time.sleep, seconds)

            engine.loop.runner = FaultyRunner(engine.loop.runner, faults, block)
        if not self._args.watchdog_timeout:
            return

        def on_stall(error: StalledError) -> None:
            if engine.failure is None:
                engine.declare_dead(error)
                self._report(engine, error)

        Watchdog(
            lambda: engine.busy_since,
            self._args.watchdog_timeout,
            on_stall,
            lambda: os._exit(EXIT_STALLED),
            loop,
        ).start()

    def _report(self, engine: Any, error: BaseException) -> None:
        """Writes the crash report, once."""
        if self._reported:
            return
        self._reported = True
        where = pathlib.Path(self._args.crash_dir) if self._args.crash_dir else crash_report.folder()
        flags = {name: value for name, value in vars(self._args).items() if name not in SECRET_FLAGS}
        recent = getattr(getattr(engine, "loop", None), "recent", ())
        path = crash_report.write(where, error, flags=flags, stats=engine.client.stats(), steps=list(recent))
        if path is not None:
            self._say(f"crash report: {path}")

    async def _drain(self, grpc_server: GrpcServer, service: TextService) -> None:
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


def _start_in_thread(
    config: EngineConfig, args: argparse.Namespace, say: Any, on_loss: Callable[[str], None]
) -> asyncio.Future[Any]:
    """Starts the engine beside the event loop. A daemon thread: a signal during start-up ends the process at once."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def deliver(result: Any, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def work() -> None:
        result, error = None, None
        try:
            from serving.boot.startup import start

            result = start(
                config,
                say=lambda line: loop.call_soon_threadsafe(say, line) and None,
                on_loss=lambda reason: loop.call_soon_threadsafe(on_loss, reason) and None,
            )
        except BaseException as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(deliver, result, error)

    threading.Thread(target=work, daemon=True, name="jaxserve-start").start()
    return future


def _import_front_ends(http: bool) -> None:
    import serving.metrics
    import serving.service

    if http:
        import serving.frontends.openai.server  # noqa: F401


def main(argv: list[str] | None = None) -> int:
    """Runs the server. Returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    args, config = parse(argv)
    if args.supervise:
        setup_logging(args.log_format, args.log_level)
        return Supervisor([sys.executable, "-m", "serving.launch", *(a for a in argv if a != "--supervise")]).run()
    memory.begin_start()
    setup_logging(args.log_format, args.log_level)
    print(describe(args), file=sys.stderr, flush=True)
    strike_at_start(wanted(args.inject_fault))
    if config.coordinator is not None or config.num_processes is not None or config.process_id is not None:
        from serving.boot.follow import run_follower
        from serving.processes.start import place_of

        try:
            place = place_of(config)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
        if place is not None and place.index > 0:
            return run_follower(config, place, lambda line: print(line, file=sys.stderr, flush=True))
    tracing = None
    if args.otlp_traces_endpoint is not None:
        try:
            tracing = Tracing.to_collector(args.otlp_traces_endpoint)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_FAILED
    try:
        return event_loop.run(_run(args, config, tracing))
    finally:
        if tracing is not None:
            tracing.shutdown()


async def _run(args: argparse.Namespace, config: EngineConfig, tracing: Tracing | None) -> int:
    return await Server(args, config, tracing).run()  # made inside the loop: its events belong to it


def cli() -> NoReturn:
    """The process: runs the server and ends with its status."""
    status = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: that joins threads, and those of a dead engine or an interrupted compilation may never end.
    os._exit(status)


if __name__ == "__main__":
    cli()
