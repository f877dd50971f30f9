"""How large things are when the operator does not say: dtypes, slots, token budget, page pool, context."""

from __future__ import annotations

import dataclasses
import os

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.api import CausalLM
from ops import native
from ops.paged_attention import KVGroups, best_layout, bytes_per_page, least_page_size, use_backend
from ops.paged_attention.groups import layers_per_page
from serving.engine.api.config import EngineConfig
from serving.engine.cache.kv_windows import longest, pages_of
from serving.engine.device.group import Meet
from serving.engine.device.placement import num_replicas
from serving.engine.requests.chunks import CHUNK_ALIGN

GIB = 1 << 30
ACCELERATOR_FRACTION = 0.9
"""Of a device's memory, what weights, pages and temporaries may take (vLLM's gpu_memory_utilization)."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Resolved sizes of an engine; of each replica, where its mesh holds several.

    Attributes:
        page_bytes: of one page in all arrays, over all devices together.
        layers_per_page: layers that a page holds a part of a sequence for; None for all. See ops.paged_attention.groups.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_pages: int
    page_size: int
    page_bytes: int
    kv_dtype: str
    layers_per_page: int | None = None


def resolve_dtype(config: EngineConfig, platform: str) -> str:
    """The compute dtype: bfloat16 matmuls fall off XLA's fast path on most CPUs, float32 ones do not."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def resolve_quantization(config: EngineConfig, platform: str, devices: int) -> str | None:
    """The weights' scheme. `auto` is int8 where that is both fastest and within 1 % of float32's perplexity: on one CPU
    device with vectorized native kernels (docs/benchmarks/notes_matmul.md), when the dtype is left open too."""
    if config.quantization != "auto":
        return None if config.quantization in (None, "none") else config.quantization
    wanted = platform == "cpu" and devices == 1 and config.dtype == "auto"
    return "int8" if wanted and native.available() and native.isa() != "generic" else None


def resolve_kv_dtype(config: EngineConfig, model: CausalLM, dtype: str, devices: int) -> str:
    """What pages hold. `auto` is the compute dtype, but bfloat16 beside weights that `auto` made int8, where the native
    kernels read such pages: half the bytes of a decode step, and no worse a perplexity (-0.05 to -0.16 % on two texts;
    docs/benchmarks/notes_attention.md). Plain XLA on a CPU is slower with it, not faster."""
    if config.kv_cache_dtype != "auto":
        return config.kv_cache_dtype
    platform = jax.default_backend()
    quantized = resolve_quantization(config, platform, devices) == "int8" and config.dtype == "auto"
    if platform != "cpu" or not quantized:
        return dtype
    with use_backend(config.attention_backend):
        layouts = {best_layout(spec, config.page_size, jnp.bfloat16, platform) for spec in model.kv_specs()}
    return "bfloat16" if layouts == {"panels"} else dtype


def resolve_sizes(
    config: EngineConfig,
    model: CausalLM,
    max_positions: int,
    dtype: str,
    mesh: Mesh | None,
    meet: Meet | None = None,
    platform: str | None = None,
) -> Sizes:
    """Fills in what the configuration leaves open.

    Args:
        mesh: its replicas share evenly what the configuration gives; None for a single device.
        meet: with several processes, `Group.least`: the one with the least memory decides.
        platform: where the pages will be; None for where this process is.

    Raises:
        ValueError: sizes that contradict each other, with both numbers and the flag to change.
    """
    cpu = jax.default_backend() == "cpu"
    replicas, devices = num_replicas(mesh), 1 if mesh is None else mesh.size
    seqs = -(-(config.max_num_seqs or (64 if cpu else 256)) // replicas)
    budget = -(-(config.max_num_batched_tokens or (1024 if cpu else 4096)) // replicas)
    budget = max(CHUNK_ALIGN, budget // CHUNK_ALIGN * CHUNK_ALIGN)
    if budget < seqs + CHUNK_ALIGN:
        if config.max_num_batched_tokens is not None and config.max_num_seqs is not None:
            raise ValueError(
                f"max_num_batched_tokens is {config.max_num_batched_tokens}; with max_num_seqs {config.max_num_seqs} it must "
                f"be at least {replicas * (seqs + CHUNK_ALIGN)}, or a full batch of decodes would leave no room for prompts."
            )
        if config.max_num_seqs is None:
            seqs = max(1, budget - CHUNK_ALIGN)
        else:
            budget = -(-(seqs + CHUNK_ALIGN) // CHUNK_ALIGN) * CHUNK_ALIGN
    kv_dtype = resolve_kv_dtype(config, model, dtype, devices)
    platform = platform or jax.default_backend()
    page_size = max(config.page_size, least_page_size(kv_dtype, platform))
    wanted_len = min(config.max_model_len or max_positions, max_positions)
    together = layers_per_page(model.kv_specs(), wanted_len)
    groups = KVGroups.of(model.kv_specs(), together)
    page_bytes = bytes_of_page(groups, page_size, kv_dtype, platform, config.attention_backend)
    if config.max_model_len and config.max_model_len > max_positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model was made for {max_positions} positions: "
            f"use at most that."
        )
    most = seqs * pages_of(wanted_len, groups.windows, page_size, budget) + 1
    memory = config.kv_cache_memory or default_kv_memory(devices)
    if meet is not None:
        memory = meet("KV cache memory", memory)
    num_pages = min(most, memory // replicas // page_bytes)
    fits = longest(num_pages - 1, groups.windows, page_size)
    fits = wanted_len if fits is None else fits
    if fits < 2 * page_size or (config.max_model_len and fits < config.max_model_len):
        pages = pages_of(config.max_model_len or 2 * page_size, groups.windows, page_size) + 1
        need = pages * page_bytes * replicas
        raise ValueError(
            f"the KV cache may take {memory / GIB:.2f} GiB, which holds {max(fits, 0)} tokens; one sequence of "
            f"max_model_len needs {need / GIB:.2f} GiB. Raise --kv-cache-memory or lower --max-model-len."
        )
    return Sizes(seqs, budget, min(wanted_len, fits), num_pages, page_size, page_bytes, kv_dtype, together)


def bytes_of_page(
    groups: KVGroups, page_size: int, kv_dtype: str, platform: str, attention_backend: str | None = None
) -> int:
    """Bytes of one page in every array, in the layout that the platform's kernels read, over all devices together."""
    with use_backend(attention_backend):
        return sum(
            bytes_per_page(s, page_size, jnp.dtype(kv_dtype), best_layout(s, page_size, jnp.dtype(kv_dtype), platform))
            for s in groups.arrays
        )


def default_kv_memory(devices: int) -> int:
    """Bytes for the page pool: on CPU a quarter of the free memory, at most 2 GiB; on accelerators what is left.

    A power of two on CPU and whole 256 MiB elsewhere, because the pool's size is in every compiled program: were it to
    follow the free memory of the moment, no start would find the programs of the one before.
    """
    if jax.default_backend() == "cpu":
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        quarter = max(min(available // 4, 2 * GIB), GIB // 4)
        return 1 << (quarter.bit_length() - 1)
    stats = [d.memory_stats() or {} for d in jax.local_devices()[:devices]]
    free = min(s.get("bytes_limit", 8 * GIB) * ACCELERATOR_FRACTION - s.get("bytes_in_use", 0) for s in stats)
    step = GIB // 4
    return max(int((free - GIB) * devices) // step * step, step)
