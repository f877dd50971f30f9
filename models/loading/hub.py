"""Checkpoints by their Hugging Face hub id."""

from __future__ import annotations

import re
from pathlib import Path

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def looks_like_hub_id(text: str) -> bool:
    """Whether `text` has the form owner/name."""
    return bool(_HUB_ID.fullmatch(text))


def fetch(hub_id: str, revision: str | None = None) -> Path:
    """The local directory of a hub checkpoint; downloads what is missing, with huggingface_hub's progress bars.

    Raises:
        ValueError: it is not cached and could not be downloaded; the message says what to do.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=PATTERNS))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached, and the checkpoint is not in the local cache"
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        reason = {401: "it does not exist or needs a login", 403: "access is refused", 404: "it does not exist"}.get(
            status or 0, f"the hub answered {status}"
        )
    except OSError as error:
        reason = f"the hub cannot be reached ({error})"
    raise ValueError(
        f"The checkpoint {hub_id!r} could not be fetched: {reason}. Check the name, log in with `hf auth login` if it is "
        "gated, or copy it here by other means and pass --model with its directory or GGUF file."
    )
