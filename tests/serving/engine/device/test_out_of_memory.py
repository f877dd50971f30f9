"""A start without enough memory says numbers and flags."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from serving.boot import load
from serving.boot.start import start_engine
from serving.engine.api.config import EngineConfig
from serving.engine.device.out_of_memory import explain
from tests.tiny_checkpoint import write_tiny_checkpoint

ERROR = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.")


def test_numbers_and_flags_are_told():
    device = SimpleNamespace(memory_stats=lambda: {"bytes_limit": 16 * 2**30, "bytes_in_use": 15 * 2**30})
    text = explain(ERROR, EngineConfig(kv_cache_memory=4 * 2**30, max_num_seqs=32), [device])
    for part in (
        "8589934592 bytes",
        "15.00 of its 16.00 GiB",
        "--kv-cache-memory (now 4.00 GiB)",
        "--max-num-seqs (now 32)",
    ):
        assert part in text
    assert text.index("--kv-cache-memory") < text.index("--max-num-batched-tokens") < text.index("--max-num-seqs")
    assert "--quantization" not in explain(
        ERROR, EngineConfig(quantization="int8"), [SimpleNamespace(memory_stats=lambda: None)]
    )


def test_a_start_that_does_not_fit_is_a_sentence(monkeypatch, tmp_path):
    config = EngineConfig(model=str(write_tiny_checkpoint(tmp_path / "model")), compile_cache="", progress=False)

    def fail(*args, **kwargs):
        raise ERROR

    monkeypatch.setattr(load, "load_model", fail)
    with pytest.raises(ValueError, match="--kv-cache-memory"):
        start_engine(config)
    monkeypatch.setattr(load, "load_model", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("something else")))
    with pytest.raises(RuntimeError, match="something else"):
        start_engine(config)
