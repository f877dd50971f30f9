"""Every decoder that transformers lists, tiny and random, through the bridge: `python -m tests.models.bridge.sweep [TYPE ...]`.

Prints one JSON object a type: what became of it. "equal": the comparison at load passes and greedy tokens and logits are
transformers'; "refused": it was refused, and why; "wrong": it would be served and is not equal; "not tried": transformers itself
does not run the tiny model.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
import traceback
from typing import Any

import numpy as np


def listed() -> dict[str, str]:
    """Type of configuration -> architecture, of transformers' list for text generation."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    return {kind: name if isinstance(name, str) else name[0] for kind, name in names}


def tried(kind: str, architecture: str) -> dict[str, Any]:
    """What becomes of one."""
    from models.bridge import check, eager
    from models.bridge.graph import Refused
    from models.loading import opening
    from models.loading.load import in_float32
    from models.loading.source import resolve
    from tests.models.bridge import tiny
    from tests.models.paged import PagedModel

    try:
        made = tiny.model(kind, architecture)
        expected = tiny.expected(made)
        tokens = check.some_tokens(made.config.get_text_config().vocab_size)
        eagerly = eager.eager_logits(made, tokens)
        if not np.isfinite(eagerly).all():
            return {"result": "not tried", "why": "transformers' logits are not finite"}
    except Exception as e:
        return {"result": "not tried", "why": f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            made.save_pretrained(folder)
            opened = traced(opening.open_checkpoint, resolve(folder), architecture)
            model = in_float32(opened, 112)
        except (Refused, ValueError) as e:
            return {"result": "refused", "why": str(e)[:300]}
        try:
            error = check.difference(model, tokens, eagerly)
        except Exception as e:
            traceback.print_exc()
            return {"result": "refused", "why": f"it does not run here: {type(e).__name__}: {str(e)[:200]}"}
        if not error <= check.WRONG:
            return {"result": "refused", "why": f"the comparison at load: {error:.2g}", "error": error}
        prompts = [told[: -tiny.NEW] for told, _ in expected]
        results = PagedModel(model, max_len=96).generate(prompts, tiny.NEW)
    same = [ours == wanted for (ours, _), (wanted, _) in zip(results, expected, strict=True)]
    paged = max(
        float(np.abs(ours - wanted).max() / np.abs(wanted).max())
        for (_, ours), (_, wanted) in zip(results, expected, strict=True)
    )
    good = all(same) and paged <= check.WRONG
    return {"result": "equal" if good else "wrong", "error": max(error, paged)}


def traced(open_checkpoint: Any, source: Any, architecture: str) -> Any:
    """A checkpoint opened as if it had no family here, and traced in this process."""
    import dataclasses
    import json as js

    from models import registry
    from models.bridge import family
    from models.bridge.tracing import trace

    found, registry.find = registry.find, family.bridged
    try:
        opened = open_checkpoint(source)
    finally:
        registry.find = found

    def here(hf: Any, dtype: str) -> Any:
        made = trace(js.loads(js.dumps(hf)), dtype)
        if missing := family.unknown(made):
            raise family.refusal(architecture, f"it uses operations that are not known here: {', '.join(missing)}")
        family._traces[made.digest] = (js.dumps(hf), made)
        return made

    before, family.trace_of = family.trace_of, here
    try:
        config = opened.family.config(opened.hf_config)
    finally:
        family.trace_of = before
    return dataclasses.replace(opened, family=dataclasses.replace(opened.family, config=lambda _: config))


def main(kinds: list[str]) -> None:
    """Tries these types, or all: those without a family first."""
    import transformers

    from models import registry
    from models.refused import REFUSED

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    table = listed()
    native = {name for one in registry.families() for name in one.architectures}
    for kind in kinds or sorted(
        table, key=lambda kind: (table[kind] in native, "written" not in REFUSED.get(table[kind], "written"), kind)
    ):
        began = time.monotonic()
        try:
            told = tried(kind, table[kind])
        except Exception as e:
            traceback.print_exc()
            told = {"result": "failed", "why": f"{type(e).__name__}: {str(e)[:300]}"}
        seconds = round(time.monotonic() - began, 1)
        print(json.dumps({"type": kind, "architecture": table[kind], **told, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
