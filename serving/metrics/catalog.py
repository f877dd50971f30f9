"""Every metric that a server exports: name, kind, meaning, and what vLLM's users know it as.

docs/metrics.md, the dashboard and the alert rules are tested against this table, and it against a running server.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.engine.api.types import STEP_TOKEN_BOUNDS

PREFIX = "jaxserve:"
LABELS = ("model_name", "engine")

# Seconds. vLLM's bounds, with finer ones below 10 ms: small models make a token in less.
TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_BOUNDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
REQUEST_BOUNDS = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
FEW_BOUNDS = (1, 2, 3, 4, 5, 10, 20)
COUNT_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One metric family.

    Attributes:
        name: without prefix, and without the `_total` that counters get in the text.
        kind: "gauge", "counter", "histogram" or "info" (a gauge that is 1 and says all in its labels).
        vllm: its name in vLLM without prefix, or None for one of ours.
        labels: beyond `model_name` and `engine`.
        bounds: upper bounds of a histogram's buckets.
        always: it has a sample from the start, not only after the first event.
    """

    name: str
    kind: str
    text: str
    vllm: str | None = None
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()
    always: bool = True

    @property
    def sample(self) -> str:
        """The name in queries."""
        return f"{PREFIX}{self.name}{'_total' if self.kind == 'counter' else ''}"


def _gauge(name: str, text: str, same: bool = True, **more) -> Spec:
    return Spec(name, "gauge", text, vllm=name if same else None, **more)


def _counter(name: str, text: str, same: bool = True, **more) -> Spec:
    return Spec(name, "counter", text, vllm=name if same else None, **more)


def _histogram(name: str, text: str, bounds: tuple[float, ...], same: bool = True, **more) -> Spec:
    return Spec(name, "histogram", text, vllm=name if same else None, bounds=bounds, **more)


_TRANSFER: dict[str, Any] = {"same": False, "labels": ("direction",), "always": False}

SPECS: tuple[Spec, ...] = (
    _gauge("num_requests_running", "Requests in the running batch."),
    _gauge("num_requests_waiting", "Requests waiting to be scheduled."),
    _gauge(
        "num_requests_waiting_by_reason",
        "The same by what they wait for: capacity (a place, pages), or deferred (the engine is paused, a token is on its way).",
        labels=("reason",),
    ),
    _gauge("kv_cache_usage_perc", "Fraction of KV pages in use by live requests; 1 is full."),
    _counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache."),
    _counter("prefix_cache_hits", "Prompt tokens found in the prefix cache."),
    _counter("mm_cache_queries", "Images, and windows of sound, that prompts had when their places were computed."),
    _counter("mm_cache_hits", "Of them, those whose embeddings were there: another request had sent the same one."),
    _counter("mm_encoder_items", "The others: those that the encoder has read.", same=False),
    _counter(
        "mm_encoder_seconds",
        "Seconds that the encoder took for them, and for what the devices did in front of it.",
        same=False,
    ),
    _counter("num_preemptions", "Times a running request was put back to waiting."),
    _counter("prompt_tokens", "Prompt tokens processed."),
    _counter("prompt_tokens_cached", "Prompt tokens of finished requests that came from the prefix cache."),
    _counter("generation_tokens", "Tokens generated."),
    _counter(
        "request_success",
        "Completions that ended, by reason: stop, length, abort, deadline, refused, error. One of `n` counts as one.",
        labels=("finished_reason",),
    ),
    _counter(
        "admission_rejections",
        "Requests that the engine refused, by reason.",
        labels=("reason",),
        always=False,
    ),
    _counter("spec_decode_num_drafts", "Rows of steps that had drafts (speculative decoding)."),
    _counter("spec_decode_num_draft_tokens", "Drafts that steps verified."),
    _counter("spec_decode_num_accepted_tokens", "Drafts that were accepted: tokens that cost no step of their own."),
    _counter(
        "spec_decode_num_accepted_tokens_per_pos",
        "The same by place behind the token that a step begins with, from 0.",
        labels=("position",),
        always=False,
    ),
    _histogram("request_prompt_tokens", "Prompt tokens of a request.", COUNT_BOUNDS),
    _histogram("request_generation_tokens", "Tokens generated for a request.", COUNT_BOUNDS),
    _histogram("request_params_max_tokens", "max_tokens of a request, resolved.", COUNT_BOUNDS),
    _histogram("request_params_n", "Completions that a request asked for.", (1, 2, 5, 10, 20)),
    _histogram("request_num_preemptions", "Times a request was put back to waiting.", FEW_BOUNDS),
    _histogram("iteration_tokens_total", "Tokens of prompts and completions that a step computed.", STEP_TOKEN_BOUNDS),
    _histogram("request_prefill_kv_computed_tokens", "Prompt tokens that were not in the cache.", COUNT_BOUNDS),
    _histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_BOUNDS),
    _histogram(
        "inter_token_latency_seconds", "Between one output and the next of a request that is streamed.", TOKEN_BOUNDS
    ),
    _histogram(
        "request_time_per_output_token_seconds", "Mean time a token of a request, without the first.", TOKEN_BOUNDS
    ),
    _histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_BOUNDS),
    _histogram("request_queue_time_seconds", "Arrival to first scheduled.", REQUEST_BOUNDS),
    _histogram("request_prefill_time_seconds", "First scheduled to first token.", REQUEST_BOUNDS),
    _histogram("request_decode_time_seconds", "First token to end.", REQUEST_BOUNDS),
    _histogram("request_inference_time_seconds", "First scheduled to end.", REQUEST_BOUNDS),
    Spec(
        "cache_config_info",
        "info",
        "The KV cache: tokens a page, pages, their type.",
        vllm="cache_config_info",
        labels=("block_size", "num_gpu_blocks", "cache_dtype"),
    ),
    Spec(
        "lora_requests_info",
        "gauge",
        "Unix seconds; its labels: adapters of running and of waiting requests, and how many may be in a batch.",
        vllm="lora_requests_info",
        labels=("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        always=False,
    ),
    Spec(
        "model_info",
        "info",
        "The served model and what it runs on.",
        labels=("architecture", "dtype", "quantization", "mesh", "platform", "version", "max_model_len"),
    ),
    _gauge("healthy", "1 while the engine can serve, 0 once it died.", same=False),
    _counter("engine_steps", "Steps that the engine ran.", same=False),
    _counter("recompilations", "Programs compiled after start-up. Above 0 is a defect: please report it.", same=False),
    _counter("failed_steps", "Steps that the device failed, and that were tried again.", same=False),
    _counter("nonfinite_requests", "Requests that NaN or infinite logits ended.", same=False),
    _gauge("last_step_seconds", "Seconds that the last step took, device and host.", same=False),
    _gauge("last_step_host_seconds", "Seconds of the last step that the host worked.", same=False),
    _counter(
        "step_host_seconds", "Seconds that the engine thread worked: scheduling, packing, dispatching.", same=False
    ),
    _counter("step_device_wait_seconds", "Seconds that the engine thread waited for the device.", same=False),
    _counter("scheduled_tokens", "Tokens of prompts and completions that steps computed.", same=False),
    _counter("bucket_tokens", "The same with the padding to the compiled step shapes.", same=False),
    _gauge("bucket_fill_ratio", "Scheduled tokens over those with padding, since start; 1 wastes nothing.", same=False),
    _counter(
        "expert_tokens",
        "Tokens that visited each expert of a mixture, over all layers.",
        same=False,
        labels=("expert",),
        always=False,
    ),
    _gauge(
        "expert_load_ratio",
        "Tokens of the busiest expert over the mean of its layer since the start, of the worst of a group of layers; 1 is even.",
        same=False,
        labels=("layers",),
        always=False,
    ),
    _counter("kv_transfer_requests", "Requests whose pages went between engines.", **_TRANSFER),
    _counter("kv_transfer_bytes", "Bytes of pages and states that went between engines.", **_TRANSFER),
    _counter("kv_transfer_device_bytes", "Of these bytes, those that went from device to device.", **_TRANSFER),
    _counter("kv_transfer_seconds", "Seconds that transfers took together.", **_TRANSFER),
    _counter("kv_transfer_tokens", "Prompt tokens that other engines computed for this one.", same=False, always=False),
    _counter(
        "kv_transfer_fallbacks",
        "Requests whose pages did not come, or not all of them, and were computed here, by reason.",
        same=False,
        labels=("reason",),
        always=False,
    ),
    _gauge("kv_transfer_leases", "Requests whose pages are kept for other engines.", same=False, always=False),
    _gauge("kv_transfer_leased_pages", "Pages that are kept for them.", same=False, always=False),
    _counter("kv_transfer_leases_expired", "Leases that nobody fetched in time.", same=False, always=False),
    _gauge("kv_transfer_receiving", "Requests that wait for pages of another engine.", same=False, always=False),
    _gauge("startup_seconds", "Seconds of each phase of start-up.", same=False, labels=("phase",), always=False),
    _counter(
        "http_requests",
        "HTTP replies, by method, route and status.",
        same=False,
        labels=("method", "handler", "status"),
        always=False,
    ),
    _histogram(
        "http_request_duration_seconds",
        "Request line to the end of the reply, by route.",
        REQUEST_BOUNDS,
        same=False,
        labels=("handler",),
        always=False,
    ),
)
BY_NAME = {spec.name: spec for spec in SPECS}


def markdown_table() -> str:
    """The table of docs/metrics.md: `python -m serving.metrics.catalog` prints it."""
    rows = ["| metric | kind | labels | meaning | in vLLM |", "|---|---|---|---|---|"]
    for spec in SPECS:
        labels = ", ".join(f"`{label}`" for label in spec.labels) or "–"
        vllm = f"`vllm:{spec.sample.removeprefix(PREFIX).replace(spec.name, spec.vllm)}`" if spec.vllm else "–"
        kind = "gauge" if spec.kind == "info" else spec.kind
        rows.append(f"| `{spec.sample}` | {kind} | {labels} | {spec.text} | {vllm} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
