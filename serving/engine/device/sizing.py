"""How large things are when the operator does not say: dtypes, slots, token budget, page pool, context."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from models.api import CausalLM
from ops import native
from ops.linear.weights import grouped
from ops.paged_attention import (
    KVGroups,
    KVSpec,
    best_layout,
    bytes_per_page,
    default_page_size,
    in_8_bits_is_fast,
    least_page_size,
    mixed_whole,
    use_backend,
)
from ops.paged_attention.groups import layers_per_page
from serving.engine.api.config import EngineConfig
from serving.engine.cache.kv_windows import longest, pages_of
from serving.engine.cache.snapshots import SNAPSHOT_SHARE, budget
from serving.engine.device.followers import Meet
from serving.engine.device.programs.placement import num_replicas
from serving.engine.requests.buckets import ACCELERATOR_RIDGE, CPU_RIDGE, VERIFIED_RIDGES
from serving.engine.requests.cache_specs import RecurrentSpec, recurrent_of
from serving.engine.requests.chunks import CHUNK_ALIGN
from serving.engine.requests.sizes import Sizes
from serving.memory import free_memory

GIB = 1 << 30
BLOCKS_ON = ("vnni", "bf16")
"""Instruction sets on which blocks are as fast as int8 with eight rows too."""
LEAST_IN_BLOCKS = 300_000_000
"""Weights from which on what a checkpoint has in blocks stays so by itself."""
ACCELERATOR_FRACTION = 0.9
"""Of a device's memory, what weights, pages and temporaries may take (vLLM's gpu_memory_utilization)."""


def resolve_dtype(config: EngineConfig, platform: str) -> str:
    """The compute dtype: bfloat16 matmuls fall off XLA's fast path on most CPUs, float32 ones do not."""
    if config.dtype != "auto":
        return config.dtype
    return "float32" if platform == "cpu" else "bfloat16"


def resolve_quantization(config: EngineConfig, platform: str, devices: int, in_blocks: int = 0) -> str | None:
    """The weights' scheme. `auto` is int8 where that is both fastest and within 1 % of float32's perplexity: on one CPU
    device with vectorized native kernels (docs/benchmarks/notes_matmul.md), when the dtype is left open too. A large model that a
    checkpoint has in blocks stays as it is stored where there is VNNI: nothing is rounded a second time, and one row, which waits
    for the weights, has fewer bytes to wait for. Small ones gain nothing by it, and adapters are int8's. On GPUs and TPUs what
    a checkpoint has in few bits stays so.

    Args:
        in_blocks: weights that would stay as the checkpoint has them, where all would that count.
    """
    if config.quantization != "auto":
        return None if config.quantization == "none" else config.quantization
    if platform in grouped.PLATFORMS:
        return "stored" if in_blocks else None
    if not (platform == "cpu" and devices == 1 and config.dtype == "auto" and native.available()):
        return None
    isa = native.isa()
    if in_blocks >= LEAST_IN_BLOCKS and isa in BLOCKS_ON and not config.enable_lora:
        return "stored"
    return None if isa == "generic" else "int8"


def resolve_kv_dtype(
    config: EngineConfig, model: CausalLM, dtype: str, devices: int, draft: CausalLM | None = None
) -> str:
    """What pages hold. `auto` is the compute dtype, but beside weights that are rounded themselves, on one CPU whose native kernels
    read them, 8 bits where that is safe and fast (`_in_8_bits`), and else bfloat16, which costs less than rounding weights does
    (docs/benchmarks/notes_attention.md). Plain XLA on a CPU is slower with either, not faster.

    Args:
        draft: a model whose pages hold the same.
    """
    models = (model,) if draft is None else (model, draft)
    exact = any(getattr(one, "exact_pages", False) for one in models)
    if config.kv_cache_dtype != "auto":
        if exact and jnp.dtype(config.kv_cache_dtype).itemsize < 2:
            raise ValueError(
                f"kv_cache_dtype is {config.kv_cache_dtype!r}, and this model adds the distance to its scores, for which its pages "
                "keep positions: eight bits do not hold them. Take bfloat16, float32 or auto."
            )
        return config.kv_cache_dtype
    platform = jax.default_backend()
    quantized = resolve_quantization(config, platform, devices) is not None and config.dtype == "auto"
    if platform != "cpu" or not quantized:
        return dtype
    specs = [spec for one in models for spec in one.kv_specs()]
    narrow = ("int8", "bfloat16") if _in_8_bits(specs) and not exact else ("bfloat16",)
    with use_backend(config.attention_backend):
        for kept in narrow:
            size = config.page_size or default_page_size(kept, platform)
            if {best_layout(spec, size, jnp.dtype(kept), platform) for spec in specs} == {"panels"}:
                return kept
    return dtype


def _in_8_bits(specs: Sequence[KVSpec]) -> bool:
    """Whether `auto` takes 8 bits where the native kernels read all layers' pages: their heads are mixed whole, so that no channel
    costs the others their precision (+0.12 % of perplexity at most, 6.3 % without), and this machine multiplies such pages as
    they lie. Not for latents and indexed keys, which are not mixed, nor for heads that are mixed in parts, which nobody has
    measured."""
    return in_8_bits_is_fast() and all(mixed_whole(spec) for spec in specs)


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What an engine's sizes are before it is known how much memory its pages may take; of each replica.

    Attributes:
        wanted_len: tokens a sequence may have if the pages allow it.
        page_bytes: of one page in all arrays, over all devices together.
        windows: of the attention groups.
        replicas: how many there are.
        given_len: the configuration's max_model_len; None where it leaves that open.
        recurrent: what layers that keep a state keep of a running request; None where there are none.
        draft_tokens, draft_places: as in Sizes.
        given_seqs: the configuration says how many requests run at once.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    wanted_len: int
    page_size: int
    page_bytes: int
    kv_dtype: str
    layers_per_page: int | None
    windows: tuple[int | None, ...]
    replicas: int
    given_len: int | None
    recurrent: RecurrentSpec | None = None
    draft_tokens: int = 0
    draft_places: int = 0
    given_seqs: bool = True

    def within(self, memory: int) -> Sizes:
        """The sizes with so many bytes for the pages, states and snapshots of all replicas.

        Raises:
            ValueError: they hold no sequence of the length asked for, with both numbers and the settings to change.
        """
        seqs = self._slots(memory // self.replicas)
        most = seqs * self._pages(self.wanted_len, self.max_num_batched_tokens) + 1
        states, num_snapshots = 0, 0
        if self.recurrent is not None:
            share = SNAPSHOT_SHARE if self.windows else 1.0
            states, num_snapshots = budget(memory // self.replicas, self.recurrent.state_bytes, seqs, share)
            if states > memory // self.replicas:
                raise ValueError(
                    f"the KV cache may take {in_words(memory)}; the states of recurrent layers alone need "
                    f"{in_words(states * self.replicas)} for {seqs * self.replicas} requests at once. Raise kv_cache_memory or "
                    "lower max_num_seqs."
                )
        num_pages = min(most, (memory // self.replicas - states) // self.page_bytes) if self.windows else 2
        fits = longest(num_pages - 1, self.windows, self.page_size)
        fits = self.wanted_len if fits is None else fits
        least = min(2 * self.page_size, self.wanted_len)
        if fits < least or (self.given_len and fits < self.given_len):
            tokens = self.given_len or least
            need = ((self._pages(tokens, 1) + 1) * self.page_bytes + states) * self.replicas
            raise ValueError(
                f"the KV cache may take {in_words(memory)}, which holds {max(fits, 0)} tokens; one sequence of {tokens} "
                f"tokens needs {in_words(need)}. Raise kv_cache_memory or lower max_model_len."
            )
        return Sizes(
            seqs, self.max_num_batched_tokens, min(self.wanted_len, fits), num_pages, self.page_size,
            self.page_bytes, self.kv_dtype, self.layers_per_page, num_snapshots, self.draft_tokens, self.draft_places,
        )  # fmt: skip

    def _slots(self, memory: int) -> int:
        """Requests that run at once; where nobody said how many, only so many that their states leave half of the memory."""
        if self.recurrent is None or self.given_seqs:
            return self.max_num_seqs
        return min(self.max_num_seqs, max(1, memory // 2 // self.recurrent.state_bytes - 1))

    def _pages(self, tokens: int, chunk: int) -> int:
        return pages_of(tokens, self.windows, self.page_size, chunk)


def batch_sizes(
    max_num_seqs: int | None, max_num_batched_tokens: int | None, replicas: int, cpu: bool
) -> tuple[int, int]:
    """(slots, tokens a step) of each replica; None is decided here.

    Raises:
        ValueError: a full batch of decodes would leave no room for prompts.
    """
    seqs = -(-(max_num_seqs or (64 if cpu else 256)) // replicas)
    budget = -(-(max_num_batched_tokens or (1024 if cpu else 4096)) // replicas)
    budget = max(CHUNK_ALIGN, budget // CHUNK_ALIGN * CHUNK_ALIGN)
    if budget < seqs + CHUNK_ALIGN:
        if max_num_batched_tokens is not None and max_num_seqs is not None:
            raise ValueError(
                f"max_num_batched_tokens is {max_num_batched_tokens}; with max_num_seqs {max_num_seqs} it must be at least "
                f"{replicas * -(-(seqs + CHUNK_ALIGN) // CHUNK_ALIGN) * CHUNK_ALIGN}, or a full batch of decodes would leave "
                "no room for prompts."
            )
        if max_num_seqs is None:
            seqs = max(1, budget - CHUNK_ALIGN)
        else:
            budget = -(-(seqs + CHUNK_ALIGN) // CHUNK_ALIGN) * CHUNK_ALIGN
    return seqs, budget


def resolve_bounds(
    config: EngineConfig,
    model: CausalLM,
    max_positions: int,
    dtype: str,
    mesh: Mesh | None,
    platform: str | None = None,
    draft: CausalLM | None = None,
) -> Bounds:
    """Fills in what the configuration leaves open and needs no look at the devices' memory; no weights are needed.

    Args:
        mesh: its replicas share evenly what the configuration gives; None for a single device.
        platform: where the pages will be; None for where this process is.
        draft: a model whose layers share the pages of this one's: all of a sequence's, then.
    Raises:
        ValueError: sizes that contradict each other, with both numbers and the setting to change.
    """
    platform = platform or jax.default_backend()
    replicas, devices = num_replicas(mesh), 1 if mesh is None else mesh.size
    seqs, budget = batch_sizes(config.max_num_seqs, config.max_num_batched_tokens, replicas, platform == "cpu")
    check_length(config, max_positions)
    kv_dtype = resolve_kv_dtype(config, model, dtype, devices, draft)
    page_size = config.page_size or default_page_size(kv_dtype, platform)
    page_size = max(page_size, least_page_size(kv_dtype, platform))
    wanted_len = config.max_model_len or max_positions
    together = layers_per_page(model.kv_specs(), wanted_len)
    groups = KVGroups.of(model.kv_specs(), together)
    page_bytes = bytes_of_page(groups, page_size, kv_dtype, platform, config.attention_backend)
    if draft is not None:
        together = len(model.kv_specs())
        groups = KVGroups.of(model.kv_specs(), together)
        if groups.windows != (None,):
            raise ValueError(
                "speculative_config: a draft model needs a model with a layer that attends to all positions."
            )
        page_bytes = sum(
            bytes_of_page(KVGroups.of(m.kv_specs()), page_size, kv_dtype, platform, config.attention_backend)
            for m in (model, draft)
        )
    return Bounds(
        seqs,
        budget,
        wanted_len,
        page_size,
        page_bytes,
        kv_dtype,
        together,
        groups.windows,
        replicas,
        config.max_model_len,
        recurrent_of(model),
        given_seqs=config.max_num_seqs is not None,
        **_drafts(config, budget, platform),
    )


def _drafts(config: EngineConfig, budget: int, platform: str) -> dict[str, Any]:
    """How many drafts a step of `budget` tokens verifies at most."""
    if config.speculative_config is None:
        return {}
    drafts = config.speculative_config.draft_tokens
    if drafts >= budget:
        raise ValueError(
            f"num_speculative_tokens is {drafts}; a step of {budget} tokens verifies {budget - 1} at most."
        )
    return {"draft_tokens": drafts, "draft_places": draft_places(budget, platform == "cpu")}


def draft_places(budget: int, cpu: bool) -> int:
    """Places that a step of `budget` tokens has for tokens and their drafts."""
    return min(budget, VERIFIED_RIDGES * (CPU_RIDGE if cpu else ACCELERATOR_RIDGE))


def check_length(config: EngineConfig, max_positions: int) -> None:
    """Raises ValueError for a context that the model was not made for."""
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model was made for {max_positions} positions: "
            f"use at most that."
        )


def resolve_sizes(
    config: EngineConfig,
    model: CausalLM,
    max_positions: int,
    dtype: str,
    mesh: Mesh | None,
    meet: Meet | None = None,
    platform: str | None = None,
) -> Sizes:
    """`resolve_bounds` with the memory that the configuration names, or with what is free now, once weights are loaded.

    Args:
        meet: with several processes, `Followers.least`: the one with the least memory decides.
    Raises:
        ValueError: as `resolve_bounds` and `Bounds.within`.
    """
    bounds = resolve_bounds(config, model, max_positions, dtype, mesh, platform)
    memory = config.kv_cache_memory or default_kv_memory(
        1 if mesh is None else mesh.size, config.gpu_memory_utilization
    )
    if meet is not None:
        memory = meet("KV cache memory", memory)
    return bounds.within(memory)


def in_words(size: int) -> str:
    """Bytes as a person reads them: "1.50 GiB", "3.0 MiB", "512 KiB"."""
    if size >= GIB // 10:
        return f"{size / GIB:.2f} GiB"
    return f"{size / (1 << 20):.1f} MiB" if size >= 1 << 20 else f"{size / 1024:.0f} KiB"


def bytes_of_page(
    groups: KVGroups, page_size: int, kv_dtype: str, platform: str, attention_backend: str | None = None
) -> int:
    """Bytes of one page in every array, in the layout that the platform's kernels read, over all devices together."""
    with use_backend(attention_backend):
        return sum(
            bytes_per_page(s, page_size, jnp.dtype(kv_dtype), best_layout(s, page_size, jnp.dtype(kv_dtype), platform))
            for s in groups.arrays
        )


def default_kv_memory(devices: int, share: float | None = None, less: int = 0) -> int:
    """Bytes for the page pool: on CPU a quarter of the free memory, the container's where it has a bound, at most 2 GiB; on
    accelerators what is left.

    Args:
        less: bytes of each device that something else will take: adapters.
        share: of the free memory on CPU instead (all of that), and of an accelerator's memory, weights included, as vLLM has it.

    A power of two on CPU and whole 256 MiB elsewhere, because the pool's size is in every compiled program: were it to
    follow the free memory of the moment, no start would find the programs of the one before.
    """
    if jax.default_backend() == "cpu":
        available = max(0, free_memory()[0] - less * devices)
        wanted = min(available // 4, 2 * GIB) if share is None else int(available * share)
        quarter = max(wanted, GIB // 4)
        return 1 << (quarter.bit_length() - 1)
    stats = [d.memory_stats() or {} for d in jax.local_devices()[:devices]]
    free = min(
        s.get("bytes_limit", 8 * GIB) * (share or ACCELERATOR_FRACTION) - s.get("bytes_in_use", 0) - less for s in stats
    )
    step = GIB // 4
    return max(int((free - GIB) * devices) // step * step, step)
