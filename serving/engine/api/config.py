"""Everything an engine is started with. Flags of `serving.launch` and arguments of `LLM` end up here."""

from __future__ import annotations

import dataclasses

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
QUANTIZATIONS = ("auto", "none", "int8")
POLICIES = ("fcfs", "priority")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Start-up configuration. Names and meanings are those vLLM's users know; None means "decide at start".

    Attributes:
        model: GGUF file, Hugging Face or Orbax directory, hub id, or None for the default model.
        dtype: compute dtype; `auto` is float32 on CPU and bfloat16 elsewhere.
        quantization: weight quantization; `auto` is int8 on a CPU with native kernels (when `dtype` is auto too) and none
            elsewhere.
        kv_cache_dtype: what pages hold; `auto` follows dtype and quantization (serving/engine/device/sizing.py says how).
        max_model_len: longest prompt plus completion, in tokens; None is the model's own, cut to what the pool holds.
        max_num_seqs: requests running at once (slots). None: 64 on CPU, 256 elsewhere.
        max_num_batched_tokens: token budget of one step, decode and prefill together. None: 1024 on CPU, 4096 elsewhere.
        page_size: positions a KV page holds.
        kv_cache_memory: bytes for the page pool over all devices; None: from free memory.
        seed: base of the seeds of requests that bring none.
        mesh: "data=1,model=1"; data is the number of replicas, which share what the sizes here allow.
        cpu_devices: split the CPU into this many devices.
        coordinator: with several processes, "host:port" of process 0, or "auto"; see sharding.processes.find.
        num_processes, process_id: how many there are and which one this is; found by "auto".
        step_timeout: with several processes, seconds that a step may take before the engine counts as stuck.
        policy: order of waiting requests.
        enable_prefix_caching: share pages of equal prefixes.
        async_scheduling: schedule and dispatch a step while the one before it runs (False: an ablation).
        max_num_queued_reqs, max_num_queued_tokens: bounds of the waiting queue; None is unbounded.
        max_waiting_time, max_running_time: seconds a request may wait for its first slot, and run after it.
        num_scheduler_steps: decode steps in one dispatch while nothing waits (a device loop; ends early when all rows end).
        prefix_first: among waiting requests of equal priority, those with the longest cached prefix first.
        fair_share: least-served tenant (API key or metadata) first, within equal priority.
        kv_offload_gb: GiB of host memory for pages evicted from the device.
        compile_cache: folder of compiled programs; None is the user's cache folder, "" is none.
        compiled: folder that `serving.plan --save` wrote: its programs are run, and nothing is compiled.
        served_model_name: id under which the model is served; None is its own name.
        chat_template: file or text overriding the model's.
        attention_backend: force one implementation of paged attention; None takes the first that fits.
        progress: show bars and steps on stderr.
    """

    model: str | None = None
    dtype: str = "auto"
    quantization: str | None = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    page_size: int = 16
    kv_cache_memory: int | None = None
    seed: int = 0
    mesh: str = "data=1,model=1"
    cpu_devices: int | None = None
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    step_timeout: float = 10.0
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    async_scheduling: bool = True
    max_num_queued_reqs: int | None = None
    max_num_queued_tokens: int | None = None
    max_waiting_time: float | None = None
    max_running_time: float | None = None
    num_scheduler_steps: int = 1
    prefix_first: bool = False
    fair_share: bool = False
    kv_offload_gb: float = 0.0
    compile_cache: str | None = None
    compiled: str | None = None
    served_model_name: str | None = None
    chat_template: str | None = None
    attention_backend: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        """Raises ValueError with a sentence naming the setting, its value and what is allowed."""
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("quantization", self.quantization or "none", QUANTIZATIONS)
        _one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _one_of("policy", self.policy, POLICIES)
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory",
            "cpu_devices",
            "num_processes",
            "max_num_queued_reqs",
            "max_num_queued_tokens",
            "num_scheduler_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.page_size < 8 or self.page_size > 256 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two from 8 to 256, got {self.page_size}.")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}.")
