"""Pages that were computed under an adapter travel as such: the tokens are those of one engine alone, and no page is taken for the
base's or another adapter's.

Slow: engines with room for adapters have programs of their own.
"""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.serving.engine.test_engine import run, settle
from tests.serving.transfer import local
from tests.serving.transfer.test_two_engines import WAYS, P, apart, prompt, request, told
from tests.tiny import own_tiny_model, tiny_engine

pytestmark = pytest.mark.slow

SIZES = {"max_num_seqs": 2, "max_num_batched_tokens": 32, "num_pages": 60, "adapter_slots": 2}


def write(folder, room, seed):
    """An adapter of every projection."""
    folder.mkdir()
    rng, tensors = np.random.default_rng(seed), {}
    for site in room.sites:
        for piece in site.recipe.pieces if site.path.startswith("layers.") else ():
            (outputs, inputs), module = piece.shape, f"base_model.model.{piece.name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (rng.standard_normal((4, inputs)) * inputs**-0.5).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((outputs, 4)) * 0.5).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4}))
    return folder


async def test_pages_of_an_adapter_travel_and_are_never_anothers(tmp_path):
    transport = local.LocalTransport()
    roles = {"prefill": None, "decode": transport}
    plain = tiny_engine(model=own_tiny_model(), **SIZES)
    first, second = (
        tiny_engine(model=own_tiny_model(), transfers=dataclasses.replace(WAYS, role=role), transport=way, **SIZES)
        for role, way in roles.items()
    )
    transport.engines = {P: first}
    try:
        digests: list[str | None] = [None]
        for name, seed in (("a", 1), ("b", 2)):
            path = str(write(tmp_path / name, plain.runner.executor.adapters.room, seed))
            (digest,) = {engine.runner.adapters.load(name, path).digest for engine in (plain, first, second)}
            digests.append(digest)
        said, tokens = [], prompt(40, 1)
        for turn in range(2):  # the second time pages of the same tokens lie about, computed under the others
            for i, digest in enumerate(digests):
                whole = dataclasses.replace(request(f"r{turn}{i}", tokens, max_tokens=20), adapter=digest)
                found = await apart((first, second, transport), whole)
                assert found.token_ids == (await run(plain, whole)).token_ids, (turn, i)
                said.append(tuple(found.token_ids))
        assert len(set(said)) == 3 and said[:3] == said[3:]
        assert told(second).tokens_in > 0, "they came from there"
        await settle(second)
        for engine in (first, second):
            engine.runner.guard.check()
    finally:
        for engine in (plain, first, second):
            engine.shutdown()
