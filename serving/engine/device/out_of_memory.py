"""A start that does not fit, told with its numbers and the flag to change."""

from __future__ import annotations

import re
from typing import Any

from serving.engine.api.config import EngineConfig

GIB = 1 << 30


def explain(error: BaseException, config: EngineConfig, devices: list[Any]) -> str:
    """One sentence or a few: how much was wanted, how much there is, what to lower, in the order of what it costs least.

    Args:
        error: what XLA or the allocator said.
        devices: local devices; their `memory_stats()` may be None (CPUs have none).
    """
    parts = ["the device has too little memory to start"]
    wanted = re.search(
        r"(?:allocat\w*|request\w*)[^0-9]{0,40}([0-9][0-9,.]*)\s*(bytes|[KMGT]i?B)?", str(error), re.IGNORECASE
    )
    if wanted:
        parts.append(f"{wanted[1]} {wanted[2] or 'bytes'} more were wanted")
    for device in devices[:1]:
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            used, limit = stats.get("bytes_in_use", 0) / GIB, stats["bytes_limit"] / GIB
            parts.append(f"{used:.2f} of its {limit:.2f} GiB are in use")
    cache = "decided at start" if config.kv_cache_memory is None else f"{config.kv_cache_memory / GIB:.2f} GiB"
    advice = [
        f"--kv-cache-memory (now {cache})",
        f"--max-num-batched-tokens (now {config.max_num_batched_tokens or 'the default'}), which temporary arrays follow",
        f"--max-num-seqs (now {config.max_num_seqs or 'the default'})",
    ]
    if config.quantization in ("none", "auto"):
        advice.append("or say --quantization int8 for weights of a quarter to half the size")
    return f"{'; '.join(parts)}. Lower {', then '.join(advice[:3])}{'; ' + advice[3] if len(advice) > 3 else ''}."
