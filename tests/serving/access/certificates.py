"""Certificates for TLS tests, made with the machine's openssl: an authority, and a server and a client that it signed."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def make(folder: pathlib.Path) -> None:
    """Writes ca.pem, server.pem/.key, client.pem/.key and stranger.pem/.key (signed by nobody we know) to `folder`."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    _authority(folder, "ca", "test authority")
    _authority(folder, "stranger", "stranger")
    for name in ("server", "client"):
        _run(folder, "req", *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (folder / "extensions").write_text("\n".join(_LEAF))
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "extensions")
        _run(folder, "x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signed)
        # As Python 3.13 checks (VERIFY_X509_STRICT), whichever Python runs the tests.
        _run(folder, "verify", "-x509_strict", "-CAfile", "ca.pem", f"{name}.pem")


# RFC 5280: what each may be used for, and by which key it was signed.
_LEAF = (
    "subjectAltName=DNS:localhost,IP:127.0.0.1",
    "basicConstraints=critical,CA:FALSE",
    "keyUsage=critical,digitalSignature",
    "extendedKeyUsage=serverAuth,clientAuth",
    "subjectKeyIdentifier=hash",
    "authorityKeyIdentifier=keyid",
)
_AUTHORITY = ("basicConstraints=critical,CA:TRUE", "keyUsage=critical,digitalSignature,keyCertSign,cRLSign")


def _authority(folder: pathlib.Path, name: str, subject: str) -> None:
    config = ["[req]", "distinguished_name=none", "x509_extensions=authority", "[none]", "[authority]"]
    (folder / "authority.cnf").write_text("\n".join([*config, *_AUTHORITY, "subjectKeyIdentifier=hash"]))
    made = ("-keyout", f"{name}.key", "-out", f"{name}.pem", "-days", "2", "-subj", f"/CN={subject}")
    _run(folder, "req", "-x509", *_KEY, *made, "-config", "authority.cnf")


def _run(folder: pathlib.Path, *args: str) -> None:
    subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)
