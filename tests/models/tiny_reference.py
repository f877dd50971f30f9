"""Tiny random models of every architecture, made by transformers: the checkpoint, and what it should compute."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.tiny import TINY
from tests.models.tiny_base import BASE, PROMPTS, STEPS

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""XLA_FLAGS that compile in half the time what runs once."""


def random_model(name: str) -> Any:
    """transformers' model."""
    import torch
    import transformers

    tiny = TINY[name]
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None or key not in BASE}
    config = getattr(transformers, tiny.config)(**fields)
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, tiny.model)(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # As large as trained weights: at transformers' 0.02 a layer of this width would hardly matter.
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            elif parameter_name.endswith("A_log"):  # states that last
                parameter.normal_(-2.0, 1.0)
            elif "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
    return model


def make_reference(name: str, directory: Path) -> None:
    """Saves the random model as safetensors, and its greedy tokens and logits as `reference.npz`."""
    import torch

    tiny, model = TINY[name], random_model(name)
    model.save_pretrained(directory)
    vocab = model.config.get_text_config().vocab_size
    rng = np.random.default_rng(len(name))
    arrays: dict[str, np.ndarray] = {}
    kept = "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache_params"
    for index, length in enumerate(PROMPTS):
        tokens = rng.integers(3, vocab, length).tolist()
        with torch.no_grad():
            cache: Any = None
            pending = tokens
            for _ in range(STEPS):
                if tiny.cached:
                    out = model(torch.tensor([pending]), use_cache=True, **{kept: cache})
                    cache = getattr(out, kept)
                else:
                    out = model(torch.tensor([tokens]), use_cache=False)
                pending = [int(out.logits[0, -1].argmax())]
                tokens = tokens + pending
            arrays[f"logits{index}"] = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].float().numpy()
        arrays[f"tokens{index}"] = np.array(tokens)
    np.savez(directory / "reference.npz", **arrays)


def compare(
    directory: Path,
    mesh: str | None = None,
    steps: int = STEPS,
    path: Path | None = None,
    quantization: str | None = None,
) -> dict[str, float]:
    """Runs the checkpoint (or the one at `path`) through our loader and pages; how far it is from the reference.

    Returns:
        `error`: the largest difference of logits over the largest logit. `tokens`: the fraction of greedy tokens that
        are the reference's. `direction`: the cosine between logits and the reference's in the middle of all positions whose
        context is the reference's.
    """
    import jax.numpy as jnp

    from models.loading.load import load_model, resolve
    from sharding.mesh import make_mesh
    from tests.models.paged import PagedModel

    devices = None if mesh is None else make_mesh(mesh)
    loaded = load_model(
        resolve(str(path or directory)), dtype=jnp.float32, quantization=quantization, mesh=devices, max_model_len=160,
        progress=False,
    )  # fmt: skip
    reference = np.load(directory / "reference.npz")
    prompts = [reference[f"tokens{i}"][:length].tolist() for i, length in enumerate(PROMPTS)]
    paged = PagedModel(loaded.model, mesh=devices)
    results = paged.generate(prompts, steps)
    # Where nobody reads the other positions, what is read is the same to the last bit.
    for all_of_it, sampled in zip(results, paged.generate(prompts, steps, sampled=True), strict=True):
        assert all_of_it[0] == sampled[0]
        read = ~np.isnan(sampled[1])
        np.testing.assert_array_equal(all_of_it[1][read], sampled[1][read])
    error, same, directions = 0.0, [], []
    for index, (tokens, logits) in enumerate(results):
        wanted = reference[f"logits{index}"][: len(logits)]
        # Positions whose context is the reference's: all of them, while greedy tokens agree.
        agree = np.array(tokens) == reference[f"tokens{index}"][: len(tokens)]
        upto = len(wanted) if agree.all() else int(np.argmin(agree))
        error = max(error, float(np.abs(logits - wanted)[:upto].max() / np.abs(wanted).max()))
        same.append(agree[len(prompts[index]) :].mean())
        lengths = np.linalg.norm(logits, axis=-1) * np.linalg.norm(wanted, axis=-1)
        directions.append((np.einsum("nv,nv->n", logits, wanted) / lengths)[:upto])
    return {
        "error": error,
        "tokens": float(np.mean(same)),
        "direction": float(np.median(np.concatenate(directions))),
    }


def slug(name: str) -> str:
    """A folder's name: another one when the variant is defined anew, since folders may outlive a run."""
    digest = hashlib.sha256(repr((BASE, TINY[name], PROMPTS, STEPS)).encode()).hexdigest()[:8]
    return f"{name.replace(',', '').replace(' ', '-')}-{digest}"


def main(root: str, mesh: str, names: list[str]) -> None:
    """Compares checkpoints made before, on a mesh of CPU devices; prints one JSON object a line."""
    import math

    import jax

    jax.config.update("jax_num_cpu_devices", math.prod(int(part.split("=")[1]) for part in mesh.split(",")))
    for name in names:
        print(json.dumps({"name": name} | compare(Path(root) / slug(name), mesh, steps=8)), flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1], sys.argv[2], sys.argv[3:])
