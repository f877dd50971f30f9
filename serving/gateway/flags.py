"""The flags of `python -m serving.gateway`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from serving import gateway
from serving.access import ClientTls
from serving.access.flags import access_of, add_access_flags, tls_of

TARGET_KEY_VARIABLE = "JAXSERVE_TARGET_API_KEY"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Flags; wrong ones end the process with status 2 and a sentence."""
    from serving.boot.engine_flags import in_flags
    from serving.boot.flags import HTTP_PORT, Parser, check_parsers

    parser = Parser(prog="python -m serving.gateway", description=gateway.__doc__, allow_abbrev=False)
    parser.add_argument("--target", required=True, help="engines to serve from: host:port[,host:port...]")
    parser.add_argument("--model", help="where the tokenizer and chat template come from: what the engines serve")
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja file or text instead of the model's own")
    parser.add_argument("--tool-call-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--reasoning-parser", metavar="NAME", help="instead of what the chat template shows")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=HTTP_PORT, help="HTTP port; 0 takes a free one (default: 8000)")
    parser.add_argument("--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="browser origins")
    parser.add_argument(
        "--connect-timeout", type=float, default=0.0, metavar="S",
        help="give up when no engine has answered for so many seconds after the start; 0 waits for as long as it takes "
        "(default: 0)",
    )  # fmt: skip
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
        if not target_names(args):
            raise ValueError(f"--target names no engine, got {args.target!r}. It takes host:port[,host:port...].")
        access_of(args)
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
    """The engines' addresses."""
    return [name.strip() for name in args.target.split(",") if name.strip()]
