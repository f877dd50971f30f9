"""TLS and mutual TLS, from the files and under the names that uvicorn and vLLM know (`--ssl-keyfile`, ...)."""

from __future__ import annotations

import dataclasses
import pathlib
import ssl
from typing import Any

CERT_REQS = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}


@dataclasses.dataclass(frozen=True)
class ServerTls:
    """A server's certificate, and whose clients it takes.

    Attributes:
        keyfile, certfile: PEM; the certificate with its chain.
        ca_certs: PEM of the authorities whose clients are known; None asks clients for no certificate.
        cert_reqs: "none", "optional" or "required": mutual TLS.
    Raises:
        ValueError: files that do not go together, in a sentence.
    """

    keyfile: str
    certfile: str
    ca_certs: str | None = None
    cert_reqs: str = "none"

    def __post_init__(self) -> None:
        if self.cert_reqs not in CERT_REQS:
            raise ValueError(f"ssl_cert_reqs must be one of {', '.join(CERT_REQS)}; got {self.cert_reqs!r}.")
        if self.cert_reqs != "none" and self.ca_certs is None:
            raise ValueError(f"ssl_cert_reqs {self.cert_reqs} needs ssl_ca_certs: whose certificates to accept.")
        self.context()

    @property
    def mutual(self) -> bool:
        return self.cert_reqs == "required"

    def context(self) -> ssl.SSLContext:
        """For Python's own sockets; TLS 1.2 at least. Raises ValueError when the files cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certfile, self.keyfile, password=_no_password)
            if self.ca_certs is not None:
                context.load_verify_locations(self.ca_certs)
        except (OSError, ssl.SSLError) as error:
            names = f"{self.certfile}, {self.keyfile}" + (f", {self.ca_certs}" if self.ca_certs else "")
            raise ValueError(f"the TLS files ({names}) cannot be used: {_reason(error)}.") from None
        context.verify_mode = CERT_REQS[self.cert_reqs]
        return context

    def grpc_arguments(self) -> dict[str, Any]:
        """Arguments of `grpc.ssl_server_credentials`. gRPC knows no optional client certificates: "optional" asks none."""
        return {
            "private_key_certificate_chain_pairs": [(_read(self.keyfile), _read(self.certfile))],
            "root_certificates": _read(self.ca_certs) if self.mutual and self.ca_certs else None,
            "require_client_auth": self.mutual,
        }


@dataclasses.dataclass(frozen=True)
class ClientTls:
    """How to reach a gRPC server over TLS.

    Attributes:
        ca_certs: PEM of the authorities that its certificate may come from; None: the system's.
        keyfile, certfile: our own certificate, for servers that ask for one.
    """

    ca_certs: str | None = None
    keyfile: str | None = None
    certfile: str | None = None

    def __post_init__(self) -> None:
        if (self.keyfile is None) != (self.certfile is None):
            raise ValueError("a client's certificate needs both its key and its certificate file.")

    def grpc_arguments(self) -> dict[str, Any]:
        """Arguments of `grpc.ssl_channel_credentials`.

        Raises:
            ValueError: a file that cannot be read.
        """
        names = (
            ("root_certificates", self.ca_certs),
            ("private_key", self.keyfile),
            ("certificate_chain", self.certfile),
        )
        return {name: _read(path) if path else None for name, path in names}


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"the TLS file {path} cannot be read ({error.strerror}).") from None


def _no_password() -> str:
    """Instead of asking on the terminal, which OpenSSL would do."""
    raise OSError("the key is encrypted, and there is nobody to ask for its password")


def _reason(error: Exception) -> str:
    return getattr(error, "reason", None) or getattr(error, "strerror", None) or str(error)
