"""What transformers computes of a checkpoint, by itself: the other side of the comparison in `check.py`."""

from __future__ import annotations

import io

import numpy as np
import torch
import transformers

from models.bridge.graph import Refused

PREFILL = 40
"""Tokens that are read at once; the others one at a time, over transformers' own cache."""


def reference(folder: str, tokens: list[int]) -> bytes:
    """Logits [n, V] float32 of every token, as the bytes of a numpy file.

    Raises:
        Refused: transformers does not load the checkpoint.
    """
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except Exception as e:  # whatever a checkpoint makes it say
        raise Refused(f"transformers does not load it to compare with: {type(e).__name__}: {e}") from e
    out = io.BytesIO()
    np.save(out, eager_logits(model, tokens))
    return out.getvalue()


def eager_logits(model: torch.nn.Module, tokens: list[int]) -> np.ndarray:
    """logits_TV float32 of a model of transformers', with its cache."""
    with torch.no_grad():
        said = model(torch.tensor([tokens[:PREFILL]]))
        cache = getattr(said, "past_key_values", None)
        if cache is None:  # some keep none
            return model(torch.tensor([tokens])).logits[0].float().numpy()
        rows = [said.logits[0]]
        for token in tokens[PREFILL:]:
            said = model(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            rows.append(said.logits[0])
            cache = said.past_key_values
    return torch.cat(rows).float().numpy()
