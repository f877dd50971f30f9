"""Runs a gateway: listens at once, waits for its engines, serves from those that are there."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving import event_loop
from serving.access.flags import access_of, http_options, limit_changes, tls_of, warnings_for
from serving.errors import RequestError
from serving.gateway.flags import parse, target_names, target_tls
from serving.gateway.pool import Pool

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

    async def run(self) -> int:
        """Returns the exit status: 0 after a signal, 1 when it cannot serve."""
        from serving.frontends.http.server import serve_app
        from serving.gateway.connecting import Connector
        from serving.gateway.waiting import Doorway
        from serving.service import Limits

        args, tls = self._args, tls_of(self._args)
        for line in warnings_for(args.host, access_of(args), tls):
            say(line)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        names = target_names(args)
        try:
            engines = Connector(names, self._on_ready, args.target_api_key, target_tls(args), say)
            door = Doorway(engines.sentence)
            http = await serve_app(door, Limits(), host=args.host, port=args.port, tls=tls)
        except (ValueError, OSError) as error:
            say(f"error: {error}")
            return 1
        engines.start()
        try:
            say(f"listening at {http.url}; waiting for {', '.join(names)}")
            if not await self._wait_for_first(engines):
                return 0 if self._stop.is_set() else 1
            door.app = await self._application()
            say(f"ready at {http.url}, serving {self._info().model_id} from {', '.join(names)}")
            await self._stop.wait()
            await self._drain()
        except (ValueError, OSError, RequestError) as error:
            say(f"error: {error}")
            return 1
        finally:
            await http.stop(1.0)
            await engines.close()
        return 0

    def _on_ready(self, name: str, client: RemoteEngineClient) -> None:
        if self._pool is None:
            self._pool = Pool([client])
            self._first.set()
        else:
            self._pool.add(client)

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
        from serving.metrics import MeteredClient
        from serving.service import Limits, TextService

        args, info = self._args, self._info()
        side = await asyncio.to_thread(lambda: load_text_side(resolve(args.model, progress=True), args.chat_template))
        if side.tokenizer.vocab_size > info.vocab_size:
            raise ValueError(
                f"The tokenizer has {side.tokenizer.vocab_size} tokens, the served model {info.model_id} "
                f"{info.vocab_size}. Name the model that the engines serve with --model."
            )
        assert self._pool is not None
        self._service = TextService(
            MeteredClient(self._pool),
            side.tokenizer,
            side.chat_template,
            model_id=info.model_id,
            grammar_compiler=RemoteGrammars(),  # type: ignore[arg-type]
            tool_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            limits=Limits.for_model(info.max_model_len, **limit_changes(args)),
        )
        app = create_app(self._service, access=access_of(args), **http_options(args))
        await rehearse(app)
        return app

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
