"""A plan as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from typing import Any

from serving.plan.planner import Plan, Step

GIB = 1 << 30


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything a plan says; bytes and seconds, of one device unless the name says otherwise."""
    request = plan.request
    return {
        "architecture": (request.hf.get("architectures") or ["?"])[0],
        "topology": request.target.text,
        "devices": request.target.num_devices,
        "mesh": request.mesh,
        "dtype": request.dtype,
        "quantization": request.scheme,
        "kv_cache_dtype": request.kv_dtype,
        "page_size": request.page_size,
        "max_num_seqs": request.max_num_seqs,
        "max_num_batched_tokens": request.max_num_batched_tokens,
        "max_model_len": request.max_model_len,
        "context": request.context,
        "prompt": request.prompt,
        "fits": plan.fits,
        "num_parameters": plan.num_parameters,
        "memory": {
            "chip": request.target.chip.memory,
            "usable": plan.usable,
            "weights": plan.weights,
            "adapters": plan.adapters,
            "tower": plan.tower,
            "state": plan.state,
            "snapshots": plan.snapshots,
            "temporaries": plan.temporaries,
            "code": plan.code,
            "page": plan.kv_page,
            "pool": plan.pool,
            "draft_weights": plan.draft_weights,
        },
        "num_pages": plan.num_pages,
        "attention_windows": plan.windows,
        "pool_tokens": plan.tokens,
        "max_concurrent_requests": plan.max_concurrent,
        "decode_step_seconds": plan.decode_seconds,
        "decode_tokens_per_second": plan.decode_tokens_per_second,
        "ttft_seconds": plan.ttft_seconds,
        "verified": [dataclasses.asdict(step) for step in plan.verified],
        "compile_seconds": plan.compile_seconds,
        "extrapolated_from_layers": plan.extrapolated_from,
        "programs": [_program(step) for step in plan.steps],
    }


def _program(step: Step) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": step.name,
        "seconds": step.seconds,
        "matmul_seconds": step.matmul,
        "memory_seconds": step.memory,
        "links_seconds": step.links,
        "weight_bytes": step.weight_bytes,
        "context_bytes": step.context_bytes,
    }
    if step.measured is not None:
        entry = dataclasses.asdict(step.measured) | entry
        entry["compile_seconds"] = step.measured.seconds
    return entry


def to_text(plan: Plan) -> str:
    """A page for a terminal."""
    request, chip = plan.request, plan.request.target.chip
    name = (request.hf.get("architectures") or ["?"])[0]
    quantized = f", {request.scheme} weights" if request.scheme else ""
    lines = [
        f"{name}, {plan.num_parameters / 1e9:.2f} B parameters, {plan.num_layers} layers, {request.dtype}{quantized}, "
        f"pages of {request.page_size} x {request.kv_dtype}",
        f"on {request.target.text} ({request.target.num_devices} devices of {chip.memory / GIB:.0f} GiB), mesh {request.mesh}",
        "",
        "FITS" if plan.fits else _does_not_fit(plan),
        "",
        "memory of a device",
        *(
            f"  {label:<34}{value / GIB:9.3f} GiB"
            for label, value in (
                ("weights", plan.weights),
                *((("weights of the draft model", plan.draft_weights),) if plan.draft_weights else ()),
                *_adapters(plan),
                *((("tower, and room for its embeddings", plan.tower),) if plan.tower else ()),
                ("temporaries (largest program)", plan.temporaries),
                ("programs", plan.code),
                ("sampling and recurrent states", plan.state),
                *((("snapshots of states", plan.snapshots),) if plan.snapshots else ()),
                (f"KV pool: {plan.num_pages} pages", plan.pool),
                ("of usable (90 %)", plan.usable),
            )
        ),
        f"  {plan.tokens} positions; {plan.max_concurrent} requests of {request.context} tokens at once",
        "",
        f"{'program':<38}{'flops':>9}{'weights':>9}{'context':>9}{'sent':>9}{'coll.':>6}"
        f"{'mxu ms':>9}{'hbm ms':>9}{'ici ms':>9}{'step ms':>9}{'compile s':>11}",
    ]
    for step in plan.steps:
        m = step.measured
        lines.append(
            f"{step.name:<38}{_si(m.flops if m else 0):>9}{_si(step.weight_bytes):>9}{_si(step.context_bytes):>9}"
            f"{_si(m.sent if m else 0):>9}{m.num_collectives if m else 0:>6.0f}{step.matmul * 1e3:>9.3f}{step.memory * 1e3:>9.3f}"
            f"{step.links * 1e3:>9.3f}{step.seconds * 1e3:>9.3f}{m.seconds if m else 0:>11.1f}"
        )
    if plan.fits and plan.decode_seconds:
        lines += [
            "",
            f"decode: {plan.decode_seconds * 1e3:.2f} ms a step of {plan.max_concurrent} requests, "
            f"{plan.decode_tokens_per_second or 0:,.0f} tokens/s ({1 / plan.decode_seconds:.1f} tokens/s each)",
        ]
    if plan.fits and plan.ttft_seconds:
        lines.append(
            f"time to first token of a {request.prompt}-token prompt on an idle server: {plan.ttft_seconds * 1e3:.1f} ms"
        )
    lines += [
        f"verifying {step.places - 1} drafts of {step.requests} request{'s' if step.requests > 1 else ''}: "
        f"{step.seconds * 1e3:.2f} ms; pays from {step.tokens_needed:.2f} tokens a row on, guessing not counted"
        for step in plan.verified
    ]
    if request.decode_only:
        lines += ["", "Only the decode step was compiled: temporaries are its own, and those of prompts are larger."]
    lines += ["", "Times are rooflines: the chip's published rates, nothing lost. docs/plan.md says what is in them."]
    if plan.extrapolated_from:
        a, b = plan.extrapolated_from
        lines.append(f"Step programs were compiled with {a} and {b} layers and extrapolated to {plan.num_layers}.")
    return "\n".join(lines)


def _adapters(plan: Plan) -> list[tuple[str, int]]:
    """The line about room for adapters; none where there is no room."""
    request = plan.request
    if not request.adapter_slots:
        return []
    return [(f"{request.adapter_slots} adapters of rank {request.max_lora_rank}", plan.adapters)]


def _does_not_fit(plan: Plan) -> str:
    request = plan.request
    need = (
        plan.weights + plan.draft_weights + plan.adapters + plan.tower + plan.temporaries + plan.code + plan.state
        + (plan.pages_of(request.max_model_len) + 1) * plan.kv_page
    )  # fmt: skip
    what = "weights, adapters, temporaries" if plan.adapters else "weights, temporaries"
    return (
        f"DOES NOT FIT: {what} and one request of {request.max_model_len} tokens take {need / GIB:.2f} GiB a "
        f"device, {plan.usable / GIB:.2f} are usable. Use more devices on the model axis, --quantization int8, or a "
        "shorter --max-model-len."
    )


def _si(value: float) -> str:
    for unit in ("", "K", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}E"


def sweep_text(plans: list[tuple[Plan | None, str]]) -> str:
    """One line a candidate, best first, and a recommendation.

    Args:
        plans: (plan, what it is) pairs; None where it could not be made.
    """
    lines = [
        f"{'topology':<14}{'mesh':<20}{'fits':<6}{'weights GiB':>12}{'positions':>11}{'requests':>9}"
        f"{'decode tok/s':>14}{'per device':>11}{'TTFT ms':>9}"
    ]
    ranked = sorted((p for p, _ in plans if p is not None), key=rank)
    for plan in ranked:
        rate = plan.decode_tokens_per_second or 0.0
        lines.append(
            f"{plan.request.target.text:<14}{plan.request.mesh:<20}{'yes' if plan.fits else 'no':<6}{plan.weights / GIB:>12.2f}"
            f"{plan.tokens:>11}{plan.max_concurrent:>9}{rate:>14,.0f}{rate / plan.request.target.num_devices:>11,.0f}"
            f"{'-' if plan.ttft_seconds is None else f'{plan.ttft_seconds * 1e3:.1f}':>9}"
        )
    lines += [f"{text}" for plan, text in plans if plan is None]
    best = next((p for p in ranked if p.fits), None)
    lines.append("")
    if best is None:
        lines.append("Nothing fits. Use a larger topology, --quantization int8, or a shorter --max-model-len.")
    else:
        lines.append(
            f"Recommended: --mesh {best.request.mesh} on {best.request.target.text}: the most decoded tokens a second and "
            "device among those that fit."
        )
    return "\n".join(lines)


def rank(plan: Plan) -> tuple[bool, float]:
    """Sorts plans best first: those that fit, by decoded tokens a second and device."""
    return not plan.fits, -(plan.decode_tokens_per_second or 0.0) / plan.request.target.num_devices
