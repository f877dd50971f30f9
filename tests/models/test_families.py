"""Every architecture against transformers: a tiny random checkpoint through our loader and pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.tiny import TINY
from tests.models.tiny_gguf import ARCHITECTURES, to_gguf
from tests.models.tiny_reference import QUICK, compare

ROOT = Path(__file__).parents[2]


OTHERS = ("deepseek v3.2, everything chosen", "glm-5", "mistral 4")
"""Variants of which others do all that they do."""


def marked(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name in OTHERS else ()) for name in names]


@pytest.mark.parametrize("name", marked(list(TINY)))
def test_logits_and_greedy_tokens(name, references):
    result = compare(references(name))
    assert result["error"] < 1e-4
    assert result["tokens"] == 1.0


# Its metadata has no place for what these have: some layers other than the rest, or numbers other than the published ones.
NOT_IN_GGUF = (
    "qwen2, windows",
    "qwen2moe",
    "gemma3",
    "llama4",
    "llama4, chunks",
    "smollm3, windows",
    "gpt2, own head, scores by layer",
)
GGUF = [name for name in TINY if TINY[name].model in ARCHITECTURES and name not in NOT_IN_GGUF]


@pytest.mark.parametrize("name", marked(GGUF))
def test_the_same_through_gguf(name, references, tmp_path):
    to_gguf(references(name), tmp_path / "tiny.gguf")
    result = compare(references(name), path=tmp_path / "tiny.gguf", steps=4)
    assert result["error"] < 1e-4
    assert result["tokens"] == 1.0


INT8 = dict.fromkeys(TINY, 0.998) | {
    name: bound
    for bound, names in {
        0.999: (
            "gemma2", "gemma3", "granite", "granitemoe", "granite 4", "granite 4, experts, positions", "olmo2", "exaone 4",
            "minimax-m2", "starcoder2", "gpt2", "gpt2, own head, scores by layer", "falcon h1", "mamba 2", "nemotron-h",
        ),
        0.997: (
            "llama, tied, one kv head", "mistral small 3", "phi3, partial rotary", "phi3, longrope", "mamba", "qwen2moe",
            "deepseek v2, groups", "nemotron-h, experts",
        ),
        0.996: (
            "smollm3", "smollm3, windows", "phi3, as in Phi-4-mini", "deepseek v3", "llama4", "llama4, as published", "mistral 4",
            "mistral 4, groups, with vision", "jamba", "deepseek v3.2, everything chosen",
        ),
        0.995: ("bamba", "gemma 4, per-layer embeddings, shared pages"),
        0.994: ("qwen3.5", "glm-4.7 flash"),
        0.993: ("deepseek v3.2", "glm-5, layers that share"),
        0.991: ("olmo hybrid", "olmo hybrid, no positions"),
        0.989: ("qwen3-next",),
        0.987: ("glm-5",),
        0.968: ("qwen3.5 moe",),
        0.94: ("kimi linear",),
        0.9: ("gemma 4, experts",),
    }.items()
    for name in names
}  # fmt: skip
"""How far logits may turn with weights of eight bits, as a cosine: twice as far as was measured (gemma 4's experts: half as far
again). A token that visits another expert ends elsewhere, and random routers are undecided."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_int8_weights_give_logits_of_the_same_direction(name, references):
    assert compare(references(name), steps=8, quantization="int8")["direction"] > INT8[name]


MESHES = {
    "model=4": list(TINY),
    "data=2,model=2": ["llama"],
    "expert=2,model=2": [n for n in TINY if TINY[n].expert_mesh],
}


A_PROCESS = 8  # variants that one process runs: it takes seconds to start, and several can run beside each other


def pieces() -> Iterator[Any]:
    """(mesh, names): the first variant of each architecture, and, where slow tests run, the others."""
    for mesh, names in MESHES.items():
        first = set({TINY[name].model: name for name in reversed(names)}.values())
        others = [name for name in names if name not in first]
        for some, marks in (([name for name in names if name in first], ()), (others, (pytest.mark.slow,))):
            for i in range(0, len(some), A_PROCESS):
                piece = some[i : i + A_PROCESS]
                yield pytest.param(mesh, piece, marks=marks, id=f"{mesh}: {piece[0]} to {piece[-1]}")


@pytest.mark.parametrize(("mesh", "names"), list(pieces()))
def test_on_four_devices(mesh, names, references):
    folders = [references(name) for name in names]
    command = [sys.executable, "-m", "tests.models.tiny_reference", str(folders[0].parent), mesh, *names]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [result["name"] for result in results] == names
    for result in results:
        assert result["error"] < 1e-4, result
        assert result["tokens"] == 1.0, result
