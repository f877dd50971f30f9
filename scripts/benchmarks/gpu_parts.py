"""The parts of scripts/bench_gpu.py, each for a process of its own: a device error that ends one spares the others.

A part prints a line for each row as soon as it has it, `ROW` and JSON, and `run` hands them on as they come: what was measured
before a part failed, hung or ran out of time is kept.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PARTS = ("ceilings", "decode", "prefill", "step", "tune", "engine")
_ROW = "ROW "


def run(command: Sequence[str], limit_s: float, take: Callable[[dict[str, Any]], None]) -> str | None:
    """Runs a part, and hands its rows to `take`.

    Returns:
        why it did not come to its end; None when it did.
    """
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, end)
        timer.start()
        try:
            for line in process.stdout or ():
                if line.startswith(_ROW):
                    take(json.loads(line[len(_ROW) :]))
            status = process.wait()
        finally:
            timer.cancel()
            process.kill()
        if late.is_set():
            return f"took over {limit_s:.0f} s"
        if status == 0:
            return None
        said.seek(0)
        text = said.read()
        sys.stderr.write(text)
        lines = text.strip().splitlines()
        return f"ended with status {status}{': ' + lines[-1][:200] if lines else ''}"


def print_rows(part: str, smoke: bool, backend: str | None, runs: int) -> None:
    """What the process of a part does."""
    for row in rows(part, smoke, backend, runs):
        print(_ROW + json.dumps(row), flush=True)


def rows(part: str, smoke: bool, backend: str | None, runs: int) -> Iterator[dict[str, Any]]:
    """A part's rows; a case that fails is a row that says so."""
    if part == "engine":  # in processes of its own: this one must hold no device memory
        from benchmarks.gpu_engine import compare

        for size in [(3, 16, 8)] if smoke else [(1, 128, 256), (16, 512, 256), (64, 512, 256)]:
            yield compare(*size, smoke=smoke, limit_s=160)
        return
    from ops import paged_attention

    backend = backend or ("pallas_gpu" if smoke else None)
    with paged_attention.use_backend(backend) if backend else contextlib.nullcontext():
        yield from _on_device(part, smoke, *((1, 1) if smoke else (runs, 10)))


def _on_device(part: str, smoke: bool, runs: int, repeats: int) -> Iterator[dict[str, Any]]:
    import jax

    from benchmarks import gpu_ops

    activations = "float32" if smoke else "bfloat16"

    def attention(name: str, case: Any, dtype: str) -> dict[str, Any]:
        return measured(name, lambda: vars(gpu_ops.attention(name, case, dtype, activations, repeats, runs)))

    match part:
        case "ceilings":
            device = jax.devices()[0]
            yield {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
            if device.platform == "gpu" or smoke:
                yield vars(gpu_ops.ceilings(1 << 20, 128, runs) if smoke else gpu_ops.ceilings(4 << 30, 8192, runs))
        case "decode" | "prefill":
            for one in gpu_ops.decode_cases(smoke) if part == "decode" else gpu_ops.prefill_cases(smoke):
                yield attention(*one)
        case "step":
            model = gpu_ops.Llama(64, 96, 2, 4, 2, 16, 256) if smoke else gpu_ops.Llama()
            for requests, context, dtype in step_sizes(smoke):

                def step(requests: int = requests, context: int = context, dtype: str = dtype) -> dict[str, Any]:
                    took, read = gpu_ops.decode_step(model, requests, context, dtype, activations, repeats, runs)
                    return {"seconds": took, "bytes": read, "tokens_per_second": requests / took}

                yield measured(f"{requests} x {context}, {dtype} pages", step)
        case "tune":
            chosen = {"decode": gpu_ops.decode_cases(smoke)[1], "prefill": gpu_ops.prefill_cases(smoke)[0]}
            for kind, (name, case, dtype) in chosen.items():
                for sizes in gpu_ops.tunings(smoke, kind == "prefill"):

                    def tuned(s: Any = sizes, c: Any = case, d: str = dtype) -> dict[str, Any]:
                        return vars(gpu_ops.with_tuning(s, c, d, activations, repeats, runs))

                    yield {"group": f"{kind} {name}"} | measured(str(sizes), tuned)
        case _:
            raise ValueError(f"there is no part {part!r}; there are {', '.join(PARTS)}.")


def measured(name: str, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row; a case that fails is a row that says so, so that the others are not lost with it."""
    try:
        return {"name": name} | case()
    except Exception as e:
        return {"name": name, "error": f"{type(e).__name__}: {(str(e).splitlines() or [''])[0][:200]}"}


def step_sizes(smoke: bool) -> list[tuple[int, int, str]]:
    """(requests, context, what pages hold)."""
    if smoke:
        return [(2, 40, "float32")]
    whole = [(1, 1024), (64, 1024), (256, 1024), (64, 8192)]
    return [*((requests, context, "bfloat16") for requests, context in whole), (64, 8192, "int8")]
