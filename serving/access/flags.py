"""The flags of access, the same for the server and the gateway."""

from __future__ import annotations

import argparse
import ipaddress
import os
from typing import Any

from serving.access.access import Access
from serving.access.keys import MIN_SECRET_CHARS, KeyRing
from serving.access.tls import CERT_REQS, ServerTls

KEY_VARIABLE = "JAXSERVE_API_KEY"
ADMIN_KEY_VARIABLE = "JAXSERVE_ADMIN_API_KEY"
MONITOR_KEY_VARIABLE = "JAXSERVE_MONITOR_API_KEY"
SECRET_FLAGS = frozenset({"api_key", "admin_api_key", "monitor_api_key", "target_api_key", "redis_url"})
"""Flags whose values are never shown."""


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `access_of`, `tls_of`, `http_options` and `limit_changes` read."""
    _add_http_flags(parser)
    group = parser.add_argument_group("access")
    group.add_argument(
        "--api-key", nargs="+", default=[], metavar="KEY",
        help="keys that clients must send, for all but /health, /ready and gRPC health; other users of this machine may see "
        f"flags, so prefer a file, or {KEY_VARIABLE} in the environment (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--api-key-file", default=None, metavar="FILE",
        help="hashed keys with names and roles, as `python -m serving.access` writes them (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--admin-api-key", nargs="+", default=[], metavar="KEY",
        help="keys that may also control the server (drain, sleep, new weights); without one control is closed. Or "
        f"{ADMIN_KEY_VARIABLE} in the environment (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--monitor-api-key", nargs="+", default=[], metavar="KEY",
        help="keys that read /metrics and /load, which a user's key does not, and send no requests. Or "
        f"{MONITOR_KEY_VARIABLE} in the environment (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--share-prefix-cache", action=argparse.BooleanOptionalAction, default=False,
        help="let requests of different keys share cached prompt pages; how fast an answer begins then tells what others "
        "have sent",
    )  # fmt: skip
    group.add_argument(
        "--requests-per-minute", type=int, default=None, metavar="N",
        help="requests a key may send in a minute, prompts and completions counted one each (default: no bound)",
    )  # fmt: skip
    group.add_argument(
        "--requests-at-once", type=int, default=None, metavar="N",
        help="requests of a key that may run or wait at one time (default: half of what the server takes)",
    )  # fmt: skip
    group.add_argument(
        "--allowed-hosts", nargs="+", default=[], metavar="NAME",
        help="names that a server without keys answers to beside addresses and local ones; *.zone for all below one, * for all "
        "(default: none)",
    )  # fmt: skip
    group.add_argument("--ssl-keyfile", default=None, metavar="FILE", help="TLS key, PEM (default: no TLS)")
    group.add_argument("--ssl-certfile", default=None, metavar="FILE", help="TLS certificate with its chain, PEM")
    group.add_argument("--ssl-ca-certs", default=None, metavar="FILE", help="authorities of clients' certificates, PEM")
    group.add_argument(
        "--ssl-cert-reqs", default="none", type=_cert_reqs, metavar="WHICH",
        help="clients' certificates: none, optional or required (0, 1, 2): required is mutual TLS for HTTP and gRPC",
    )  # fmt: skip


def _add_http_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="what a proxy in front puts before every path (default: nothing)",
    )
    group.add_argument(
        "--enable-force-include-usage", action="store_true", help="end every stream with token counts, asked for or not"
    )
    group.add_argument(
        "--max-embed-len", type=int, default=None, metavar="N",
        help="embed texts of up to so many tokens: those beyond the context in pieces, as the mean of these (default: the context)",
    )  # fmt: skip
    group.add_argument(
        "--max-logprobs", type=int, default=20, metavar="N", help="likeliest tokens told beside each, 0 to 20"
    )


def http_options(args: argparse.Namespace) -> dict[str, Any]:
    """What of `create_app` the flags say."""
    return {
        "cors_origins": tuple(args.allowed_origins),
        "allowed_hosts": tuple(args.allowed_hosts),
        "root_path": args.root_path.rstrip("/"),
        "force_usage": args.enable_force_include_usage,
    }


def limit_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Limits` that the flags say."""
    names = ("requests_per_minute", "max_logprobs", "max_embed_len")
    return {name: getattr(args, name) for name in names} | {"max_live_per_key": args.requests_at_once}


def access_of(args: argparse.Namespace) -> Access:
    """The keys of parsed flags and the environment.

    Raises:
        ValueError: keys that cannot be used, in a sentence.
    """
    users = [*args.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    admins = [*args.admin_api_key, *filter(None, [os.environ.get(ADMIN_KEY_VARIABLE)])]
    monitors = [*args.monitor_api_key, *filter(None, [os.environ.get(MONITOR_KEY_VARIABLE)])]
    try:
        ring = KeyRing.of(users, admins, args.api_key_file, monitors)
    except OSError as error:
        raise ValueError(f"api_key_file {args.api_key_file} cannot be read ({error.strerror}).") from None
    for name in ("requests_per_minute", "requests_at_once", "max_embed_len"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    if not 0 <= args.max_logprobs <= 20:
        raise ValueError(f"max_logprobs must be between 0 and 20, got {args.max_logprobs}.")
    if args.root_path and not args.root_path.startswith("/"):
        raise ValueError(f"root_path must begin with a slash, got {args.root_path!r}.")
    return Access(ring, args.share_prefix_cache)


def tls_of(args: argparse.Namespace) -> ServerTls | None:
    """The TLS files of parsed flags, or None without.

    Raises:
        ValueError: files that are missing or cannot be used, in a sentence.
    """
    if args.ssl_keyfile is None and args.ssl_certfile is None:
        if args.ssl_ca_certs is not None or args.ssl_cert_reqs != "none":
            raise ValueError("ssl_ca_certs and ssl_cert_reqs need ssl_keyfile and ssl_certfile.")
        return None
    if args.ssl_keyfile is None or args.ssl_certfile is None:
        raise ValueError("ssl_keyfile and ssl_certfile go together: give both.")
    return ServerTls(args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs, args.ssl_cert_reqs)


def warnings_for(host: str, access: Access, tls: ServerTls | None) -> list[str]:
    """What to tell whoever opens the server to more than this machine, or gives it a weak key."""
    lines = [
        f"warning: {name} is shorter than {MIN_SECRET_CHARS} characters and can be guessed. `python -m serving.access FILE NAME` "
        "makes good ones."
        for name in access.keys.weak
    ]
    if is_loopback(host):
        return lines
    if not access.keys and not (tls and tls.mutual):
        lines.append(
            f"warning: listening on {host} without an API key: whoever reaches this machine can use the model. "
            "Say --api-key-file FILE, or --host 127.0.0.1."
        )
    if access.keys and tls is None:
        lines.append(
            f"warning: listening on {host} without TLS: keys and texts cross the network readable. Say --ssl-keyfile and "
            "--ssl-certfile, or let a proxy that has them stand in front."
        )
    return lines


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host.strip("[]").split("%")[0]).is_loopback
    except ValueError:
        return host == "localhost"


def _cert_reqs(text: str) -> str:
    name = text if text in CERT_REQS else {str(int(v)): k for k, v in CERT_REQS.items()}.get(text)
    if name is None:
        raise argparse.ArgumentTypeError(f"takes {', '.join(CERT_REQS)}, or 0, 1, 2; got {text!r}.")
    return name
