"""python -m serving.gateway: the OpenAI API as its own process, in front of one or more engines over gRPC."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import logging
import os
import signal
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, Protocol

import numpy as np

from serving import event_loop
from serving.access import ClientTls
from serving.access.flags import access_of, add_access_flags, tls_of, warnings_for
from serving.engine.api.types import EngineInfo, EngineOutput, EngineRequest, EngineStats, TokenPair
from serving.errors import DIED, ErrorKind, RequestError

log = logging.getLogger("serving.gateway")
TARGET_KEY_VARIABLE = "JAXSERVE_TARGET_API_KEY"


class Target(Protocol):
    """What the pool needs of a remote engine: an EngineClient whose streams can be closed. Its `info().tasks` says whether
    it embeds and scores."""

    def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]: ...

    async def embed(
        self, request_id: str, token_ids: Sequence[int], *, pooling: str | None = None, priority: int = 0
    ) -> np.ndarray: ...

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray: ...

    async def abort(self, request_id: str) -> bool: ...

    def info(self) -> EngineInfo: ...

    def stats(self) -> EngineStats: ...

    @property
    def healthy(self) -> bool: ...


_ELSEWHERE = frozenset({ErrorKind.UNAVAILABLE, ErrorKind.RESOURCE_EXHAUSTED})
"""Refusals that another engine may not share."""


def _nobody() -> RequestError:
    return RequestError(ErrorKind.UNAVAILABLE, "No engine behind this gateway answers.", retry_after_s=2.0)


class Pool:
    """Several engines with the same model as one `EngineClient`.

    A request goes to the healthy engine with the least work: the requests that this gateway has there, and those that
    wait there for whomever. Equal ones take turns. A request that an engine refuses before its first token (down,
    draining, full) is tried once on each of the others.

    Raises:
        ValueError: no engine, or engines that serve different models.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        if not targets:
            raise ValueError("A gateway needs at least one target.")
        infos = [target.info() for target in targets]
        for name in ("model_id", "vocab_size", "tasks"):
            values = sorted({str(getattr(info, name)) for info in infos})
            if len(values) > 1:
                raise ValueError(f"The targets differ in {name}: {', '.join(values)}. A gateway serves one model.")
        self._targets = list(targets)
        self._live = [0] * len(targets)
        self._turn = itertools.count()
        self._info = dataclasses.replace(
            infos[0],
            max_model_len=min(info.max_model_len for info in infos),
            max_num_seqs=sum(info.max_num_seqs for info in infos),
            num_pages=sum(info.num_pages for info in infos),
        )

    def _order(self) -> list[int]:
        """Healthy targets, the one with the least work first."""
        n, turn = len(self._targets), next(self._turn)
        able = [i for i in range(n) if self._targets[i].healthy]
        return sorted(able, key=lambda i: (self._live[i] + self._targets[i].stats().num_waiting, (i - turn) % n))

    async def generate(self, request: EngineRequest) -> AsyncGenerator[EngineOutput, None]:
        """As EngineClient.generate."""
        failure = _nobody()
        for i in self._order():
            begun = False
            self._live[i] += 1
            try:
                async with contextlib.aclosing(self._targets[i].generate(request)) as outputs:
                    async for output in outputs:
                        begun = True
                        yield output
                return
            except RequestError as error:
                if begun or (error.kind not in _ELSEWHERE and error.code != DIED):
                    raise
                failure = error
            finally:
                self._live[i] -= 1
        raise failure

    async def embed(
        self, request_id: str, token_ids: Sequence[int], *, pooling: str | None = None, priority: int = 0
    ) -> np.ndarray:
        """As EmbeddingClient.embed."""
        return await self._once(lambda t: t.embed(request_id, token_ids, pooling=pooling, priority=priority))

    async def score(self, request_id: str, pairs: Sequence[TokenPair], *, priority: int = 0) -> np.ndarray:
        """As ScoringClient.score."""
        return await self._once(lambda t: t.score(request_id, pairs, priority=priority))

    async def _once(self, call: Callable[[Target], Awaitable[np.ndarray]]) -> np.ndarray:
        """A call with one answer, by the engine with the least work; the others are tried where it refuses."""
        failure = _nobody()
        for i in self._order():
            self._live[i] += 1
            try:
                return await call(self._targets[i])
            except RequestError as error:
                if error.kind not in _ELSEWHERE:
                    raise
                failure = error
            finally:
                self._live[i] -= 1
        raise failure

    async def abort(self, request_id: str) -> bool:
        found = await asyncio.gather(*(t.abort(request_id) for t in self._targets), return_exceptions=True)
        return any(one is True for one in found)

    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        """Sums over the engines; the last step's times are the longest. What the wire does not carry stays unknown."""
        all_stats = [target.stats() for target in self._targets]
        merged: dict[str, Any] = {}
        for field in dataclasses.fields(EngineStats):
            values = [getattr(stats, field.name) for stats in all_stats]
            if any(value is None for value in values):
                merged[field.name] = None
            elif isinstance(values[0], tuple):
                merged[field.name] = tuple(map(sum, zip(*values, strict=True)))
            else:
                merged[field.name] = max(values) if field.name.endswith("_s") else sum(values)
        return EngineStats(**merged)

    @property
    def healthy(self) -> bool:
        return any(target.healthy for target in self._targets)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    from serving.boot.flags import HTTP_PORT, Parser, check_parsers

    parser = Parser(prog="python -m serving.gateway", description=__doc__, allow_abbrev=False)
    parser.add_argument("--target", required=True, help="engines to serve from: host:port[,host:port...]")
    parser.add_argument("--model", help="where the tokenizer and chat template come from: what the engines serve")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file or text instead of the model's own")
    parser.add_argument("--tool-call-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--reasoning-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=HTTP_PORT, help="HTTP port; 0 takes a free one (default: 8000)")
    parser.add_argument("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="browser origins")
    parser.add_argument("--connect-timeout", type=float, default=60.0, metavar="S", help="seconds to wait for engines")
    parser.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="seconds to finish at the end")
    add_access_flags(parser)
    targets = parser.add_argument_group("targets")
    targets.add_argument(
        "--target-api-key", default=os.environ.get(TARGET_KEY_VARIABLE), metavar="KEY",
        help=f"key of role proxy at the engines, or {TARGET_KEY_VARIABLE} in the environment (default: none)",
    )  # fmt: skip
    targets.add_argument(
        "--target-tls", action="store_true", help="reach the engines over TLS; implied by the other --target-ssl flags"
    )
    targets.add_argument("--target-ssl-ca-certs", metavar="FILE", help="authorities of the engines' certificates, PEM")
    targets.add_argument(
        "--target-ssl-keyfile", metavar="FILE", help="our certificate's key, for engines that ask, PEM"
    )
    targets.add_argument("--target-ssl-certfile", metavar="FILE", help="our certificate, for engines that ask, PEM")
    parser.add_argument("--log-format", choices=("human", "json"), default="human")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    args = parser.parse_args(argv)
    try:
        access_of(args)
        tls_of(args)
        _target_tls(args)
        check_parsers(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _target_tls(args: argparse.Namespace) -> ClientTls | None:
    tls = ClientTls(args.target_ssl_ca_certs, args.target_ssl_keyfile, args.target_ssl_certfile)
    return tls if args.target_tls or tls != ClientTls() else None


async def _run(args: argparse.Namespace) -> int:
    from models.loading.source import resolve
    from serving.boot.startup import load_text_side
    from serving.frontends.grpc.client import RemoteEngineClient, RemoteGrammars
    from serving.frontends.openai.server import serve_http
    from serving.metrics import MeteredClient
    from serving.service import Limits, TextService

    access, tls = access_of(args), tls_of(args)
    for line in warnings_for(args.host, access, tls):
        print(line, file=sys.stderr, flush=True)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    names = [name.strip() for name in args.target.split(",") if name.strip()]
    clients: list[RemoteEngineClient] = []
    try:
        for name in names:
            reach = {"api_key": args.target_api_key, "tls": _target_tls(args)}
            clients.append(await RemoteEngineClient.connect(name, timeout_s=args.connect_timeout, **reach))
        pool = Pool(clients)
        side = await asyncio.to_thread(lambda: load_text_side(resolve(args.model, progress=True), args.chat_template))
        info = pool.info()
        if side.tokenizer.vocab_size > info.vocab_size:
            raise ValueError(
                f"The tokenizer has {side.tokenizer.vocab_size} tokens, the served model {info.model_id} "
                f"{info.vocab_size}. Name the model that the engines serve with --model."
            )
        service = TextService(
            MeteredClient(pool),
            side.tokenizer,
            side.chat_template,
            model_id=info.model_id,
            grammar_compiler=RemoteGrammars(),  # type: ignore[arg-type]
            tool_parser=args.tool_call_parser,
            reasoning_parser=args.reasoning_parser,
            limits=Limits.for_model(info.max_model_len, requests_per_minute=args.requests_per_minute),
        )
        http = await serve_http(
            service,
            host=args.host,
            port=args.port,
            tls=tls,
            access=access,
            cors_origins=tuple(args.allowed_origins),
        )
        print(f"ready at {http.url}, serving {info.model_id} from {', '.join(names)}", file=sys.stderr, flush=True)
        await stop.wait()
        service.start_draining()
        await service.wait_idle(args.drain_timeout)
        await http.stop()
    except (ValueError, OSError, RequestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        for client in clients:
            await client.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a gateway until SIGTERM. Returns the exit status."""
    from serving.metrics.logs import setup_logging

    args = _parse(argv)
    setup_logging(args.log_format, args.log_level)
    return event_loop.run(_run(args))


if __name__ == "__main__":
    sys.exit(main())
