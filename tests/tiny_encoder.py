"""Tiny random encoders and engines around them."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

from models.config import ModelConfig
from models.dummy import random_model
from serving.engine.api.config import EngineConfig
from serving.engine.api.types import EngineInfo
from serving.engine.device.programs.compiling import ProgramCache, starting
from serving.engine.encoder.engine import EncoderEngine
from serving.engine.encoder.runner import EncoderBuckets, EncoderRunner

VOCAB, WIDTH, LONGEST = 99, 32, 40


@functools.cache
def tiny_encoder(architecture: str = "BertModel") -> Any:
    """2 layers, 4 heads of 8, float32."""
    extra = (("segments", 2), ("first_position", 0), ("labels", ("LABEL_0",)), ("label_activation", "sigmoid"))
    config = ModelConfig(
        architecture, VOCAB, 2, WIDTH, 48, 4, 4, 8, LONGEST, 1e-12, activation="gelu", tie_embeddings=True, extra=extra
    )
    return random_model(config)


@functools.cache
def tiny_runner(task: str) -> EncoderRunner:
    """Batches of up to 4 texts of up to LONGEST tokens; compiled once a test process."""
    model = tiny_encoder("BertModel" if task == "embed" else "BertForSequenceClassification")
    with starting():
        runner = EncoderRunner(
            model, EncoderBuckets.make(LONGEST, 4, 128), ProgramCache(None, ""), classifies=task == "score"
        )
        runner.compile()
    return runner


def tiny_encoder_engine(config: EngineConfig | None = None, task: str = "embed") -> EncoderEngine:
    """A started engine; shut it down."""
    runner = tiny_runner(task)
    architecture = "BertModel" if task == "embed" else "BertForSequenceClassification"
    info = EngineInfo(
        "tiny-encoder", architecture, VOCAB, LONGEST, 4, 128, 0, 0, "float32", None, "data=1,model=1", "cpu", "test",
        tasks=("embed",) if task == "embed" else ("classify", "score"), pooling="mean", labels=("LABEL_0",),
    )  # fmt: skip
    engine = EncoderEngine(config or EngineConfig(progress=False), SimpleNamespace(source=None), runner, info)
    engine.start()
    return engine
