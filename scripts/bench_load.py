"""How long loading a checkpoint takes beside reading its file, and how much host memory it takes at most.

python scripts/bench_load.py --gb 1 --stored bfloat16 --dtype bfloat16

Writes a random Llama checkpoint as safetensors (unless --model names one; with --orbax it is converted first, and read as that),
reads the files once so that they are in the page cache, then times in turn: reading them into a fresh buffer, and
`models.loading.load.load_model`. Each runs in a process of its own, so that neither inherits the other's memory, after touching
as much as it will need and giving it back: in a virtual machine the first touch of a page that the host has not backed yet takes
20 times as long as later ones. Peak memory is the process's resident set at its highest (VmHWM), less what it was before loading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WIDTH, FFW, HEADS, KV_HEADS, VOCAB = 2048, 5632, 32, 8, 32000
FP8_BLOCK = 128


def write_checkpoint(folder: Path, gigabytes: float, stored: str) -> None:
    """A Llama of TinyLlama's widths with as many layers as the size takes; the weights repeat a block of random ones."""
    import ml_dtypes
    import numpy as np

    dtype = np.dtype(getattr(ml_dtypes, stored, stored))
    packed = dtype.itemsize == 1
    plain = np.dtype(ml_dtypes.bfloat16) if packed else dtype  # of what is not a layer's matrix
    head = WIDTH // HEADS
    shapes = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (KV_HEADS * head, WIDTH),
        "self_attn.v_proj": (KV_HEADS * head, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (FFW, WIDTH),
        "mlp.up_proj": (FFW, WIDTH),
        "mlp.down_proj": (WIDTH, FFW),
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
    }
    a_layer = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
    layers = max(1, round((gigabytes * 1e9 - VOCAB * WIDTH * plain.itemsize) / a_layer))
    tensors = {"model.embed_tokens.weight": (VOCAB, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        tensors |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in shapes.items()}
    stored_as: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    for name, shape in tensors.items():
        matrix = packed and name.endswith("_proj.weight")
        stored_as[name] = (shape, dtype if matrix else plain)
        if matrix:  # as DeepSeek-V3 scales them
            blocks = tuple(-(-n // FP8_BLOCK) for n in shape)
            stored_as[f"{name}_scale_inv"] = (blocks, np.dtype(np.float32))
    header, at = {}, 0
    names = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3"}
    for name, (shape, kind) in stored_as.items():
        end = at + int(np.prod(shape)) * kind.itemsize
        header[name] = {"dtype": names[kind.name], "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Drawing a billion numbers would take longer than everything that is measured.
    block = np.random.default_rng(0).standard_normal(1 << 22, np.float32) * 0.02
    blocks = {kind: block.astype(kind) for kind in {kind for _, kind in stored_as.values()}}
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape, kind in stored_as.values():
            file.write(np.resize(blocks[kind], shape).tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": FFW,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }
    if packed:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
    (folder / "config.json").write_text(json.dumps(config))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}.")


def touch(num_bytes: int) -> None:
    """Has the host back that much memory, and gives it back to the kernel."""
    import numpy as np

    np.ones(num_bytes, np.uint8)


def read_once(files: list[Path]) -> float:
    """Seconds to read the files into memory that was not touched before."""
    touch(sum(path.stat().st_size for path in files))
    began = time.perf_counter()
    kept = [path.read_bytes() for path in files]
    return time.perf_counter() - began if kept else 0.0


def files_of(model: str) -> list[Path]:
    """The files that hold a checkpoint's weights: safetensors, or an Orbax directory's."""
    return sorted(Path(model).glob("*.safetensors")) or sorted(p for p in Path(model).rglob("*") if p.is_file())


def load_once(model: str, dtype: str, quantization: str | None) -> dict[str, float]:
    """Loads once; seconds, and bytes of memory at the highest and after."""
    import jax

    from models.loading.load import load_model, resolve

    jax.block_until_ready(jax.numpy.zeros(1))  # the client's own start
    touch(3 * sum(path.stat().st_size for path in files_of(model)))
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    began = time.perf_counter()
    loaded = load_model(resolve(model), dtype=dtype, quantization=quantization, progress=False)
    jax.block_until_ready(jax.tree.leaves(loaded.model))
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak": resident("VmHWM") - before, "after": resident("VmRSS") - before}


def run(*arguments: str) -> dict[str, float]:
    """This script in a fresh process, with the answer that it prints."""
    out = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    return json.loads(out.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory with safetensors (default: a random one)")
    parser.add_argument("--gb", type=float, default=1.0, help="size of the random checkpoint, 10^9 bytes")
    stored = ("float32", "bfloat16", "float16", "float8_e4m3fn")
    parser.add_argument("--stored", default="bfloat16", choices=stored, help="how the random checkpoint is stored")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--quantization", choices=("int8",))
    parser.add_argument(
        "--orbax", action="store_true", help="convert it to an Orbax directory of --dtype, and load that"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--inner", choices=("read", "load"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.inner == "read":
        print(json.dumps({"seconds": read_once(files_of(a.model))}))
        return
    if a.inner == "load":
        print(json.dumps(load_once(a.model, a.dtype, a.quantization)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        if a.model is None:
            write_checkpoint(Path(folder), a.gb, a.stored)
        model = a.model or folder
        if a.orbax:
            out = str(Path(folder) / "orbax")
            convert = [sys.executable, "-m", "serving.convert", "--model", model, "--out", out, "--dtype", a.dtype]
            subprocess.run(convert, capture_output=True, check=True, cwd=ROOT)
            model = out
        size = sum(path.stat().st_size for path in files_of(model))
        more = ["--quantization", a.quantization] if a.quantization else []
        reads, loads = [], []
        for _ in range(a.repeat):
            reads.append(run("--inner", "read", "--model", model)["seconds"])
            loads.append(run("--inner", "load", "--model", model, "--dtype", a.dtype, *more))
        read, load = statistics.median(reads), statistics.median(one["seconds"] for one in loads)
        peak, after = max(one["peak"] for one in loads), loads[-1]["after"]
        print(
            f"{size / 1e9:.2f} GB {'Orbax' if a.orbax else a.stored} as {a.dtype}{' ' + a.quantization if a.quantization else ''}: "
            f"reading {read:.2f} s, loading {load:.2f} s ({load / read:.2f} x); "
            f"memory +{after / 1e9:.2f} GB after, at most +{peak / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
