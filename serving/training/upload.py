"""What was trained, into a running server: `POST /v1/load_lora_adapter`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

TIMEOUT_S = 120.0


def serve_to(url: str, name: str, path: Path, api_key: str | None = None) -> str:
    """Has a server load an adapter, in the place of one of that name.

    Args:
        url: of the server ("http://localhost:8000"), with or without /v1.
        path: as the server sees it: below its --lora-folder.
        api_key: of the admin role, where the server asks for keys.
    Returns:
        what the server said.
    Raises:
        ValueError: it could not be reached, or refused; with its own words.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--serve-to {url}: give the server's address as http://HOST:PORT.")
    body = json.dumps({"lora_name": name, "lora_path": str(path), "load_inplace": True}).encode()
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    address = f"{url.rstrip('/').removesuffix('/v1')}/v1/load_lora_adapter"
    request = urllib.request.Request(address, body, headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
            return reply.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        raise ValueError(f"{address} refused ({error.code}): {_message(error.read())}") from None
    except OSError as error:
        raise ValueError(f"{address} could not be reached: {getattr(error, 'reason', error)}.") from None


def _message(body: bytes) -> str:
    text = body.decode("utf-8", "replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
