"""From a configuration to an encoder on devices and its compiled programs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax

from models.loading.load import Opened, load_model
from models.pooling import max_sequence, pooling_mode
from ops import native
from serving.boot.assembly import compile_cache_folder, prepare_platform, progress_bar
from serving.engine.api.config import EngineConfig
from serving.engine.api.types import EngineInfo
from serving.engine.device.compiling import ProgramCache
from serving.engine.device.sizing import resolve_dtype
from serving.engine.encoder.runner import EncoderBuckets, EncoderRunner
from serving.installation import version
from sharding.mesh import make_mesh


def assemble_encoder(
    config: EngineConfig, say: Callable[[str], None], opened: Opened
) -> tuple[Any, EncoderRunner, EngineInfo]:
    """Loads the model and compiles it. Returns (loaded model, runner, info).

    Weights stay as they are unless a scheme is asked for by name: vectors are compared with those that others have stored.

    Raises:
        ValueError: what cannot be served, in a sentence.
    """
    prepare_platform(config)
    platform = jax.default_backend()
    mesh = make_mesh(config.mesh)
    dtype = resolve_dtype(config, platform)
    quantization = None if config.quantization in (None, "none", "auto") else config.quantization
    if platform == "cpu":
        say(native.status())
    began = time.monotonic()
    directory = opened.source.path
    pooling = opened.pooling or pooling_mode(directory)
    loaded = load_model(
        opened.source, dtype=dtype, mesh=mesh, quantization=quantization, progress=config.progress, opened=opened
    )
    say(f"loaded {loaded.model_id} ({loaded.config.architecture}, {dtype}) in {time.monotonic() - began:.1f} s")
    max_model_len, max_rows, max_tokens = _sizes(config, loaded.config.max_positions, max_sequence(directory), platform)
    buckets = EncoderBuckets.make(max_model_len, max_rows, max_tokens)
    fingerprint = repr(
        (
            loaded.config,
            buckets,
            dtype,
            quantization,
            str(mesh),
            sorted((k, v) for k, v in os.environ.items() if k.startswith(("JAXSERVE_", "XLA_FLAGS"))),
        )
    )
    began = time.monotonic()
    runner = EncoderRunner(
        loaded.model,
        buckets,
        ProgramCache(compile_cache_folder(config), fingerprint),
        scores="score" in opened.family.tasks,
        mesh=mesh if mesh.size > 1 else None,
    )
    with progress_bar(config.progress) as on_done:
        runner.compile(on_done)
    say(f"compiled {len(buckets.buckets)} batch shapes in {time.monotonic() - began:.1f} s")
    info = EngineInfo(
        model_id=config.served_model_name or loaded.model_id,
        architecture=loaded.config.architecture,
        vocab_size=loaded.config.vocab_size,
        max_model_len=max_model_len,
        max_num_seqs=max_rows,
        max_num_batched_tokens=max_tokens,
        page_size=0,
        num_pages=0,
        dtype=dtype,
        quantization=quantization,
        mesh=config.mesh,
        platform=platform,
        version=version(),
        num_parameters=runner.num_parameters,
        tasks=opened.family.tasks,
        pooling=pooling,
    )
    return loaded, runner, info


def _sizes(config: EngineConfig, positions: int, made_for: int | None, platform: str) -> tuple[int, int, int]:
    """(longest text, texts a batch, tokens a batch).

    Args:
        positions: that the network has.
        made_for: tokens that the checkpoint says it was trained on; what longer texts give is anybody's guess.
    """
    if config.max_model_len is not None and config.max_model_len > positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model has {positions} positions: use at most that."
        )
    longest = config.max_model_len or min(made_for or positions, positions)
    # On CPU a product of 256 rows is as fast a row as larger ones, and whoever comes next waits for the whole batch.
    tokens = config.max_num_batched_tokens or (2048 if platform == "cpu" else 32768)
    return longest, config.max_num_seqs or (64 if platform == "cpu" else 256), tokens
