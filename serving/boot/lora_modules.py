"""The adapters that a server starts with: `--lora-modules`, in the two forms that vLLM takes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from serving.engine.api.adapters import LoRARequest


def lora_module(text: str) -> LoRARequest:
    """`name=path`, or a JSON object with `name` and `path`.

    Raises:
        argparse.ArgumentTypeError: neither, or there is no such directory.
    """
    if text.lstrip().startswith("{"):
        try:
            given = json.loads(text)
            name, path = given["name"], given["path"]
        except (json.JSONDecodeError, KeyError, RecursionError):
            raise argparse.ArgumentTypeError(f"must be name=path or JSON with name and path; got {text!r}.") from None
    else:
        name, separator, path = text.partition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"must be name=path or JSON with name and path; got {text!r}.")
    if not isinstance(name, str) or not isinstance(path, str) or not name or not path:
        raise argparse.ArgumentTypeError(f"must have a name and a path; got {text!r}.")
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"names {path!r}, which is no directory.")
    return LoRARequest(name, 0, path)
