"""A model of 7B's shape with random weights in Q4_K: what its load takes, and what a decode step takes over memory's bandwidth.

    python scripts/bench_large.py make FILE [--layers 24]
    python scripts/bench_large.py run FILE [--context 128] [--repeat 9]

`make` writes a Llama of 24 layers (2.6 GB) as a GGUF file without a tokenizer. `run` loads it as it is stored and prints one JSON
object: bytes of the file, the process's peak less the file (bar: 1 GB), and milliseconds of a decode step of one request beside the
floor, which is the bytes that a step reads over the bandwidth that memory gave between the steps (bar: 85 % of it).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BLOCK, BLOCK_BYTES = 256, 144  # Q4_K
STATUS = Path("/proc/self/status")


def make(path: Path, layers: int, width: int, ffw: int, heads: int, kv_heads: int, vocab: int) -> None:
    """Writes the model, a tensor at a time; `width` and `ffw` are multiples of 256."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random 7B shape")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(ffw)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(vocab)
    matrices = {"token_embd": (vocab, width), "output": (vocab, width)}
    norms = ["output_norm"]
    for layer in range(layers):
        kv = kv_heads * width // heads
        shapes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
        shapes |= {"ffn_gate": (ffw, width), "ffn_up": (ffw, width), "ffn_down": (width, ffw)}
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in shapes.items()}
        norms += [f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"]
    kind = gguf.GGMLQuantizationType.Q4_K
    for name, (rows, inputs) in matrices.items():
        stored = (rows, inputs // BLOCK * BLOCK_BYTES)
        writer.add_tensor_info(f"{name}.weight", stored, np.dtype(np.uint8), rows * stored[1], raw_dtype=kind)
    for name in norms:
        writer.add_tensor_info(f"{name}.weight", (width,), np.dtype(np.float32), 4 * width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pool = _blocks(width)
    for rows, inputs in matrices.values():
        writer.write_tensor_data(np.resize(pool, (rows, inputs // BLOCK * BLOCK_BYTES)))
    for _ in norms:
        writer.write_tensor_data(np.ones(width, np.float32))
    writer.close()


def _blocks(width: int) -> np.ndarray:
    """Q4_K blocks of random bits, uint8 [blocks * 144], whose scales make products of about the size of their inputs."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (1 << 16) - 15, np.uint8).repeat(BLOCK_BYTES).reshape(-1, BLOCK_BYTES)
    blocks[:, 4:] = rng.integers(0, 256, blocks[:, 4:].shape, np.uint8)
    scale = 1 / (32 * 4 * width**0.5)
    blocks[:, :2] = np.array([scale], np.float16).view(np.uint8)
    blocks[:, 2:4] = np.array([7.5 * scale], np.float16).view(np.uint8)
    return blocks.reshape(-1)


def run(path: Path, context: int, repeat: int) -> dict[str, Any]:
    """See the module."""
    import jax
    from bench_step import prepare
    from flax import nnx

    from models.loading.load import load_model, resolve
    from ops import native

    if not native.available():
        raise SystemExit(f"blocks are computed by native kernels: {native.status()}")
    began = time.perf_counter()
    model = load_model(
        resolve(str(path)), dtype="float32", quantization="stored", max_model_len=4096, progress=False
    ).model
    seconds = time.perf_counter() - began
    jax.block_until_ready(jax.tree.leaves(nnx.split(model)[1]))
    found = {
        "file_bytes": path.stat().st_size,
        "load_s": round(seconds, 1),
        "peak_less_file_bytes": _peak() - path.stat().st_size,
    }
    table = sum(leaf.nbytes for leaf in jax.tree.leaves(model.embed.weight.get_value()))  # of which a step reads a row
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.split(model)[1])) - table
    parts, kv_bytes = prepare(model, (context,), 0, "bfloat16")
    probe = _bandwidth_probe()
    probes, times = [], []
    for _ in range(repeat):
        probes.append(probe())
        start = time.perf_counter()
        parts["layers"]()
        parts["logits"]()
        times.append((time.perf_counter() - start) * 1e3)
    floor = (weights + kv_bytes) / statistics.quantiles(probes, n=4)[2] * 1e3
    step = statistics.quantiles(times, n=4)[0]
    return found | {
        "step_ms": round(step, 1), "floor_ms": round(floor, 1), "of_the_bandwidth": round(floor / step, 3),
        "bandwidth_gb_s": round(statistics.median(probes) / 1e9, 1),
    }  # fmt: skip


def _bandwidth_probe() -> Callable[[], float]:
    """Reads 512 MiB of the memory that weights lie in, huge pages where there are such, with all cores: bytes a second."""
    import jax
    import jax.numpy as jnp

    from ops import buffers

    host = buffers.lasting.empty((1 << 27,), np.float32)
    host[:] = 1.0
    parts = [jax.device_put(part) for part in np.split(host, 64)]
    total = jax.jit(lambda parts: [jnp.max(part) for part in parts])
    jax.block_until_ready(total(parts))

    def probe() -> float:
        start = time.perf_counter()
        jax.block_until_ready(total(parts))
        return host.nbytes / (time.perf_counter() - start)

    return probe


def _peak() -> int:
    """Bytes that this process has had resident at most."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", choices=("make", "run"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--ffw", type=int, default=11008, help="a multiple of 256")
    parser.add_argument("--heads", type=int, nargs=2, default=(32, 8), metavar=("QUERY", "KEY"))
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=9)
    args = parser.parse_args()
    if args.what == "make":
        make(args.file, args.layers, args.width, args.ffw, args.heads[0], args.heads[1], args.vocab)
    else:
        print(json.dumps(run(args.file, args.context, args.repeat)))


if __name__ == "__main__":
    main()
