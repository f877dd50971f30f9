"""What decides the content of an engine's pages is in their identity, the draft too: its part of them travels with the model's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from models.loading.source import resolve
from serving.boot.check import check
from serving.boot.wire import what_pages_are
from serving.engine.api.config import EngineConfig
from serving.transfer.identity import identity_of
from tests.tiny_checkpoint import write_tiny_checkpoint

SETTINGS = {"dtype": "float32", "compile_cache": "", "progress": False, "max_num_seqs": 1, "max_num_batched_tokens": 32}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafts")
    return {seed: str(write_tiny_checkpoint(folder / str(seed), seed)) for seed in (7, 8, 9)}


def test_pages_beside_another_draft_are_others(checkpoints):
    pages = SimpleNamespace(page_size=8, windows=(None,))

    def identity(draft=None, **more):
        how = None if draft is None else {"model": checkpoints[draft], "num_speculative_tokens": 2, **more}
        config = EngineConfig(model=checkpoints[7], speculative_config=how, **SETTINGS)
        return identity_of(*what_pages_are(check(config, resolve(checkpoints[7]), None), pages), [], [])

    kinds = [identity(), identity(8), identity(9)]
    assert len(set(kinds)) == 3, "no draft, one, another with the same shapes"
    assert identity(8, enable_adaptive_verification=False) == kinds[1], "how many are guessed when decides no page"
