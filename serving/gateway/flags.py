"""The flags of `python -m serving.gateway`."""

from __future__ import annotations

import argparse
import os
import pathlib
from collections.abc import Sequence

from serving import gateway
from serving.access import ClientTls
from serving.access.flags import access_of, add_access_flags, tls_of
from serving.access.shared import connect
from serving.gateway.asking import SESSION
from serving.gateway.discovery import Discovery
from serving.gateway.media import add_media_flags
from serving.routing.apart import LEAST_TOKENS
from serving.routing.apart import POLICIES as PREFILL_POLICIES
from serving.routing.policies import POLICIES, Balance
from serving.routing.prefixes import MAX_BLOCKS
from serving.routing.router import Router
from serving.storage.flags import add_store_flags

REDIS_VARIABLE = "JAXSERVE_REDIS_URL"
TARGET_KEY_VARIABLE = "JAXSERVE_TARGET_API_KEY"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags; wrong ones end the process with status 2 and a sentence."""
    from serving.boot.engine_flags import in_flags
    from serving.boot.flags.launch import HTTP_PORT, Parser, check_parsers

    parser = Parser(prog="python -m serving.gateway", description=gateway.__doc__, allow_abbrev=False)
    parser.add_argument(
        "--target", nargs="+", default=[], metavar="HOST:PORT",
        help="engines to serve from, also with commas between them; dns:///HOST:PORT stands for every address of a name, such "
        "as a headless Service, and is looked up again and again",
    )  # fmt: skip
    parser.add_argument("--model", help="where the tokenizer and chat template come from: what the engines serve")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file or text instead of the model's own")
    parser.add_argument("--tool-call-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--reasoning-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=HTTP_PORT, help="HTTP port; 0 takes a free one (default: 8000)")
    parser.add_argument(
        "--grpc-port",
        type=int,
        default=None,
        metavar="PORT",
        help="serve gRPC too; 0 takes a free port (default: HTTP alone)",
    )
    parser.add_argument("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="browser origins")
    parser.add_argument(
        "--connect-timeout", type=float, default=0.0, metavar="S",
        help="give up when no engine has answered for so many seconds after the start; 0 waits for as long as it takes "
        "(default: 0)",
    )  # fmt: skip
    parser.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="seconds to finish at the end")
    add_access_flags(parser)
    add_store_flags(parser)
    _add_routing_flags(parser)
    _add_target_flags(parser)
    add_media_flags(parser)
    parser.add_argument("--log-format", choices=("human", "json"), default="human")
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    args = parser.parse_args(argv)
    try:
        if not target_names(args) and args.target_file is None:
            raise ValueError("--target names no engine, and there is no --target-file. It takes host:port ...")
        if not args.target_refresh > 0:
            raise ValueError(f"target_refresh must be above 0 seconds, got {args.target_refresh}.")
        discovery_of(args)
        prefill_discovery_of(args)
        router_of(args)
        access_of(args)
        if args.redis_keys and args.redis_url is None:
            raise ValueError("redis_keys needs redis_url.")
        if args.redis_url is not None:
            connect(args.redis_url)
        tls_of(args)
        if (tls := target_tls(args)) is not None:
            tls.grpc_arguments()
        check_parsers(args)
    except ValueError as error:
        parser.error(in_flags(str(error), vars(args).keys()))
    return args


def target_tls(args: argparse.Namespace) -> ClientTls | None:
    """How to reach the engines; None without TLS."""
    tls = ClientTls(args.target_ssl_ca_certs, args.target_ssl_keyfile, args.target_ssl_certfile)
    return tls if args.target_tls or tls != ClientTls() else None


def target_names(args: argparse.Namespace) -> list[str]:
    """What --target says, in pieces."""
    return _pieces(args.target)


def _pieces(given: Sequence[str]) -> list[str]:
    return [name.strip() for part in given for name in part.split(",") if name.strip()]


def discovery_of(args: argparse.Namespace) -> Discovery:
    """Where the engines are. Raises ValueError for what is no target."""
    return Discovery(target_names(args), args.target_file)


def prefill_discovery_of(args: argparse.Namespace) -> Discovery:
    """Where the engines are that compute prompts. Raises ValueError for what is no target, or is a target too."""
    names = _pieces(args.prefill_target)
    both = set(names) & set(target_names(args))
    if both:
        raise ValueError(f"prefill_target names {sorted(both)[0]}, and so does target: one engine is on one side.")
    if args.prefill_min_tokens < 1:
        raise ValueError(f"prefill_min_tokens must be at least 1, got {args.prefill_min_tokens}.")
    return Discovery(names, args.prefill_target_file)


def router_of(args: argparse.Namespace) -> Router:
    """What decides which engine gets a request. Raises ValueError for thresholds that make no sense."""
    if args.prefix_block_size is not None and args.prefix_block_size < 1:
        raise ValueError(f"prefix_block_size must be at least 1 token, got {args.prefix_block_size}.")
    if args.prefix_max_blocks < 1:
        raise ValueError(f"prefix_max_blocks must be at least 1, got {args.prefix_max_blocks}.")
    balance = Balance(args.cache_threshold, args.balance_abs_threshold, args.balance_rel_threshold, args.kv_threshold)
    return Router(args.policy, balance, block_tokens=args.prefix_block_size, max_blocks=args.prefix_max_blocks)


def _add_target_flags(parser: argparse.ArgumentParser) -> None:
    from serving.boot.flags.launch import HTTP_PORT

    targets = parser.add_argument_group("targets")
    targets.add_argument(
        "--target-file", type=pathlib.Path, metavar="FILE",
        help="further engines, one a line as for --target; read again when it changes",
    )  # fmt: skip
    targets.add_argument(
        "--prefill-target", nargs="+", default=[], metavar="HOST:PORT",
        help="engines of --role prefill that compute prompts for the targets, which have --role decode then; as for --target. "
        "Their addresses must mean the same to the targets (default: each target computes its own)",
    )  # fmt: skip
    targets.add_argument(
        "--prefill-target-file", type=pathlib.Path, metavar="FILE", help="further ones in a file, as --target-file"
    )
    targets.add_argument(
        "--prefill-policy", choices=PREFILL_POLICIES, default="auto",
        help="auto asks them where it pays, by the prompt's length that is not cached, by who runs and waits where, and by what "
        "transfers took; always, wherever it can be done (default: %(default)s)",
    )  # fmt: skip
    targets.add_argument(
        "--prefill-min-tokens", type=int, default=LEAST_TOKENS, metavar="N",
        help="prompts with fewer tokens to compute stay at their target (default: %(default)s)",
    )  # fmt: skip
    targets.add_argument(
        "--target-refresh", type=float, default=5.0, metavar="S",
        help="seconds between two looks at --target-file and at names (default: %(default)s)",
    )  # fmt: skip
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
    picker = parser.add_argument_group("endpoint picker")
    picker.add_argument(
        "--endpoint-picker-port", type=int, default=None, metavar="PORT",
        help="pick endpoints for Envoy and gateways of Kubernetes, by external processing, at this port; 0 takes a free one "
        "(default: none)",
    )  # fmt: skip
    picker.add_argument(
        "--target-http-port", type=int, default=HTTP_PORT, metavar="PORT",
        help="where the engines speak HTTP: what is picked is each target's host with this port (default: %(default)s)",
    )  # fmt: skip
    shared = parser.add_argument_group("shared with other gateways")
    shared.add_argument(
        "--redis-url", default=os.environ.get(REDIS_VARIABLE), metavar="URL",
        help="count --requests-per-minute together with the other gateways at this Redis, such as redis://:password@host:6379/0; "
        f"or {REDIS_VARIABLE} in the environment (default: each gateway counts alone)",
    )  # fmt: skip
    shared.add_argument(
        "--redis-keys", action="store_true",
        help="also accept the API keys in Redis' hash jaxserve:keys, name -> 'role sha256:...' as in a key file",
    )  # fmt: skip


def _objective(text: str) -> tuple[str, int]:
    name, _, priority = text.rpartition("=")
    if not name or not priority.lstrip("-").isdigit():
        raise argparse.ArgumentTypeError(f"takes NAME=PRIORITY, such as batch=10; got {text!r}.")
    return name, int(priority)


def _add_routing_flags(parser: argparse.ArgumentParser) -> None:
    usual = Balance()
    group = parser.add_argument_group("routing")
    group.add_argument(
        "--policy", choices=tuple(POLICIES), default="cache",
        help="which engine gets a request: the one that has the longest part of its prompt, unless it is overloaded (cache), the "
        "one with the fewest requests (least-loaded), the better of two (power-of-two), any (random), each in turn "
        "(round-robin) (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--cache-threshold", type=float, default=usual.cache_threshold, metavar="SHARE",
        help="share of a prompt that an engine must have for the cache to decide, else load does (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--balance-abs-threshold", type=int, default=usual.abs_threshold, metavar="N",
        help="an engine is overloaded, and neither cache nor session lead there, with over N requests more than the least loaded "
        "one (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--balance-rel-threshold", type=float, default=usual.rel_threshold, metavar="X",
        help="and with over X times as many (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--kv-threshold", type=float, default=usual.kv_threshold, metavar="SHARE",
        help="or with so much of its KV pages in use while others have room (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-block-size", type=int, default=None, metavar="N",
        help="tokens by which prefixes are told apart (default: each engine's page size)",
    )  # fmt: skip
    group.add_argument(
        "--prefix-max-blocks", type=int, default=MAX_BLOCKS, metavar="N",
        help="blocks remembered of one engine, about 100 bytes each; never more than it has pages (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--sticky-tenants", action="store_true",
        help="requests without a session stay where those of the same tenant are: API key, or x-gateway-inference-fairness-id",
    )  # fmt: skip
    group.add_argument(
        "--objective", nargs="+", type=_objective, default=[], metavar="NAME=PRIORITY",
        help="priorities of requests that say x-gateway-inference-objective: NAME; lower runs first (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--kv-events", action=argparse.BooleanOptionalAction, default=True,
        help="policy cache: go by what engines tell of their pages, where they do (--kv-events-config), instead of by what was "
        "sent there",
    )  # fmt: skip
    group.add_argument(
        "--session-header", default=SESSION, type=str.lower, metavar="NAME",
        help="header or metadata whose value keeps requests at one engine while it is well (default: %(default)s)",
    )  # fmt: skip
