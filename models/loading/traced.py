"""The comparison that a checkpoint of a traced family passes before it is served. Once: that it passed is kept."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np

from models.bridge import family
from models.bridge.check import PAGE, TOKENS, WRONG, difference, some_tokens
from models.loading.opening import Opened

log = logging.getLogger(__name__)


def compare(opened: Opened, load: Callable[[Opened, int], Any]) -> None:
    """Compares a checkpoint with what transformers computes of it, unless that was done before.

    For a while there are two float32 copies of the weights, one in a process of its own.

    Args:
        load: (checkpoint, longest context) -> the model in float32, on one device.
    Raises:
        ValueError: they differ, or cannot be compared.
    """
    config = opened.family.config(opened.hf_config)
    architecture, folder = config.architecture, opened.source.path
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors"))]
    digest = hashlib.sha256(repr((config.get("trace"), str(folder), files)).encode()).hexdigest()[:40]
    passed = family.folder() / f"{digest}.compared"
    if passed.exists():
        return
    if opened.checkpoint is None or opened.hf_config.get("quantization_config"):
        raise family.refusal(
            architecture, "these weights are packed or ours, and cannot be compared with transformers'"
        )
    tokens = some_tokens(config.vocab_size)
    log.warning("%s: comparing with transformers before it is served for the first time", architecture)
    wanted_TV = np.load(
        io.BytesIO(family.ask(architecture, ["reference", str(folder), json.dumps(tokens)], "")), allow_pickle=False
    )
    model = load(opened, TOKENS + PAGE)
    try:
        error = difference(model, tokens, wanted_TV)
    except Exception as e:  # an operation that does here what it does not there
        raise family.refusal(architecture, f"it does not run here ({type(e).__name__}: {e})") from e
    if not error <= WRONG:
        raise family.refusal(
            architecture, f"over pages its logits differ by {error:.2g} of the largest; {WRONG:g} is the most"
        )
    family.keep(passed, f"{error}\n".encode())
