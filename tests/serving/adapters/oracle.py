"""What transformers and peft say with an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def adapted(folder: Path, name: str | None) -> Iterator[Any]:
    """The model `folder / "base"` in float32, with the adapter in `folder / name`; None for the base."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    if name is not None:
        model = peft.PeftModel.from_pretrained(model, folder / name)
    model.eval()
    with torch.no_grad():
        yield model


def greedy(folder: Path, name: str | None, prompts: Sequence[Sequence[int]], steps: int) -> list[list[int]]:
    """Greedy tokens behind each prompt."""
    import torch

    found = []
    with adapted(folder, name) as model:
        for prompt in prompts:
            ids = model.generate(
                input_ids=torch.tensor([list(prompt)]), max_new_tokens=steps, do_sample=False, eos_token_id=None, pad_token_id=0
            )  # fmt: skip
            found.append(ids[0, len(prompt) :].tolist())
    return found


def logprobs(folder: Path, name: str | None, tokens: Sequence[int]) -> Any:
    """Log probabilities [T, V] at each position of a sequence."""
    import torch

    with adapted(folder, name) as model:
        return model(torch.tensor([list(tokens)])).logits[0].log_softmax(-1).numpy()
