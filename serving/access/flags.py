"""The flags of access, the same for the server and the gateway."""

from __future__ import annotations

import argparse
import ipaddress
import os

from serving.access.access import Access
from serving.access.keys import KeyRing
from serving.access.tls import CERT_REQS, ServerTls

KEY_VARIABLE = "JAXSERVE_API_KEY"
ADMIN_KEY_VARIABLE = "JAXSERVE_ADMIN_API_KEY"
SECRET_FLAGS = frozenset({"api_key", "admin_api_key", "target_api_key"})
"""Flags whose values are never shown."""


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Adds what `access_of` and `tls_of` read."""
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
        "--share-prefix-cache", action=argparse.BooleanOptionalAction, default=False,
        help="let requests of different keys share cached prompt pages; how fast an answer begins then tells what others "
        "have sent",
    )  # fmt: skip
    group.add_argument(
        "--requests-per-minute", type=int, default=None, metavar="N",
        help="requests a key may send in a minute, prompts and completions counted one each (default: no bound)",
    )  # fmt: skip
    group.add_argument("--ssl-keyfile", default=None, metavar="FILE", help="TLS key, PEM (default: no TLS)")
    group.add_argument("--ssl-certfile", default=None, metavar="FILE", help="TLS certificate with its chain, PEM")
    group.add_argument("--ssl-ca-certs", default=None, metavar="FILE", help="authorities of clients' certificates, PEM")
    group.add_argument(
        "--ssl-cert-reqs", default="none", type=_cert_reqs, metavar="WHICH",
        help="clients' certificates: none, optional or required (0, 1, 2): required is mutual TLS for HTTP and gRPC",
    )  # fmt: skip


def access_of(args: argparse.Namespace) -> Access:
    """The keys of parsed flags and the environment.

    Raises:
        ValueError: keys that cannot be used, in a sentence.
    """
    users = [*args.api_key, *filter(None, [os.environ.get(KEY_VARIABLE)])]
    admins = [*args.admin_api_key, *filter(None, [os.environ.get(ADMIN_KEY_VARIABLE)])]
    try:
        ring = KeyRing.of(users, admins, args.api_key_file)
    except OSError as error:
        raise ValueError(f"api_key_file {args.api_key_file} cannot be read ({error.strerror}).") from None
    if args.requests_per_minute is not None and args.requests_per_minute < 1:
        raise ValueError(f"requests_per_minute must be at least 1, got {args.requests_per_minute}.")
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
    """What to tell whoever opens the server to more than this machine."""
    if is_loopback(host):
        return []
    lines = []
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
