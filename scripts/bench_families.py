"""Steps of random models as ratios: against what they must read or multiply, against the same model by transformers' own code in
our programs, and against transformers.

    python scripts/bench_families.py bridged [llama qwen3 gemma3_text qwen3_moe]   # native and traced, the same shapes
    python scripts/bench_families.py hybrid [--transformers]                       # Qwen3.5-0.8B's shape

Both are int8 by default, as a CPU serves them. Needs torch and transformers (the dependency group `test`). Runs of the two that are
compared take turns; numbers are lower quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_attention import bandwidth_probe
from bench_step import prepare
from flax import nnx

from models import registry
from models.bridge import family
from models.dummy import random_values
from models.layers import Build, Linear
from models.loading.load import set_values

MIDDLE = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
"""What is compared native and traced."""
BRIDGED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma3_text": ("Gemma3ForCausalLM", {"tie_word_embeddings": True, "sliding_window": 512}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 512}),
}
HYBRID = {
    "vocab_size": 248_320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 4096, "tie_word_embeddings": True,
    "linear_num_key_heads": 16, "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
}  # fmt: skip
"""Qwen3.5-0.8B's text model."""


def configuration(kind: str, fields: dict[str, Any], architecture: str) -> tuple[Any, dict[str, Any]]:
    """(transformers' configuration, what config.json says of it)."""
    import transformers

    made = transformers.CONFIG_MAPPING[kind](**fields)
    told = json.loads(json.dumps(made.to_dict(), default=str))
    return made, told | {"architectures": [architecture]}


def random_weights(found: Any, hf: dict[str, Any], scheme: str | None) -> Any:
    """A family's model with random weights, as the loader would have stored them."""
    config = found.config(hf)
    build = Build(jnp.float32, jnp.float32, None, max_model_len=4096)
    model = found.build(config, build)
    set_values(model, random_values(model, build), quantization=scheme, progress=False)
    return model


def quartile(runs: list[float]) -> float:
    return statistics.quantiles(runs, n=4)[0]


def in_turns(parts: dict[str, Callable[[], float]], repeat: int) -> dict[str, float]:
    """Milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeat):
        for name, run in parts.items():
            times[name].append(run())
    return {name: quartile(mine) for name, mine in times.items()}


def timed(model: Any, decode: tuple[int, ...], chunk: int, kv: str) -> tuple[Callable[[], float], int]:
    """(a function that runs a step's layers and logits and gives its milliseconds, the bytes of K and V that it reads)."""
    runs, kv_bytes = prepare(model, decode, chunk, kv)

    def run() -> float:
        began = time.perf_counter()
        runs["layers"]()
        runs["logits"]()
        return (time.perf_counter() - began) * 1e3

    return run, kv_bytes


def bridged(kinds: list[str], scheme: str | None, repeat: int) -> None:
    """Native against traced."""
    kv = "bfloat16" if scheme else "float32"
    for kind in kinds:
        architecture, more = BRIDGED[kind]
        _, hf = configuration(kind, MIDDLE | more, architecture)
        native = random_weights(registry.find(architecture), hf, scheme)
        traced = random_weights(family.bridged(architecture), hf, scheme)
        for name, decode, chunk in (("decode 1", (256,), 0), ("decode 16", (256,) * 16, 0), ("prefill 512", (), 512)):
            parts = {"native": timed(native, decode, chunk, kv)[0], "traced": timed(traced, decode, chunk, kv)[0]}
            ms = in_turns(parts, repeat)
            told = {name: round(value, 2) for name, value in ms.items()}
            told |= {"ratio": round(ms["traced"] / ms["native"], 3)}
            print(json.dumps({"model": kind, "step": name, **told}), flush=True)


def multiplied(model: Any, tokens: int) -> Callable[[], float]:
    """A function that multiplies `tokens` rows with every matrix of a model's products, one after the other, as its layers do."""
    products = [module for _, module in nnx.iter_modules(model) if isinstance(module, Linear)]
    products = [module for module in products if module.weight.get_value().shape[0] < 100_000]  # not the logits'
    graphdef, state = nnx.split(nnx.List(products))

    @jax.jit
    def run(state: Any, rows: list[jax.Array]) -> list[jax.Array]:
        return [module(x) for module, x in zip(nnx.merge(graphdef, state), rows, strict=True)]

    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.standard_normal((tokens, m.weight.get_value().shape[1])), jnp.float32) for m in products]
    jax.block_until_ready(run(state, rows))

    def once() -> float:
        began = time.perf_counter()
        jax.block_until_ready(run(state, rows))
        return (time.perf_counter() - began) * 1e3

    return once


def hybrid(scheme: str | None, repeat: int, beside: bool) -> None:
    """Against bytes, products and transformers."""
    kv = "bfloat16" if scheme else "float32"
    architecture = "Qwen3_5ForCausalLM"
    config, hf = configuration("qwen3_5_text", HYBRID, architecture)
    model = random_weights(registry.find(architecture), hf, scheme)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.split(model)[1]))
    states = sum(int(np.prod(spec.shape)) for spec in model.state_specs()) * 4
    probe = bandwidth_probe()
    for rows in (1, 16):
        run, kv_bytes = timed(model, (256,) * rows, 0, kv)
        ms = in_turns({"ours": run}, repeat)["ours"]
        bandwidth = statistics.quantiles([probe() for _ in range(9)], n=4)[2]
        floor = (weights + kv_bytes + 2 * rows * states) / bandwidth * 1e3
        told = {"step": f"decode {rows}", "ms": round(ms, 1), "floor": round(floor, 1), "ratio": round(ms / floor, 2)}
        print(json.dumps(told), flush=True)
        if beside and rows == 16:
            theirs = transformers_decode(config, rows)
            told = {"step": "decode 16", "transformers": round(theirs, 1), "ratio": round(theirs / ms, 1)}
            print(json.dumps(told), flush=True)
    parts = {"ours": timed(model, (), 1024, kv)[0], "products": multiplied(model, 1024)}
    ms = in_turns(parts, max(3, repeat // 3))
    told = {name: round(value, 1) for name, value in ms.items()}
    print(json.dumps({"step": "prefill 1024", **told, "ratio": round(ms["ours"] / ms["products"], 2)}), flush=True)


def transformers_decode(config: Any, rows: int, steps: int = 6) -> float:
    """Milliseconds of one of transformers' decode steps of so many rows, in bfloat16, behind 32 tokens."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.Qwen3_5ForCausalLM(config).eval().bfloat16()
    times = []
    with torch.no_grad():
        said = model(torch.randint(3, 1000, (rows, 32)), use_cache=True)
        for _ in range(steps):
            began = time.perf_counter()
            said = model(torch.randint(3, 1000, (rows, 1)), past_key_values=said.past_key_values, use_cache=True)
            times.append((time.perf_counter() - began) * 1e3)
    return quartile(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bridged", "hybrid"))
    parser.add_argument("kinds", nargs="*", default=list(BRIDGED), metavar="KIND", help=f"of {', '.join(BRIDGED)}")
    parser.add_argument("--quantization", default="int8", help="a scheme of the server's --quantization, or none")
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--transformers", action="store_true", help="beside transformers' decode, too")
    args = parser.parse_args()
    scheme = None if args.quantization == "none" else args.quantization
    if args.what == "bridged":
        bridged(args.kinds, scheme, args.repeat)
    else:
        hybrid(scheme, args.repeat, args.transformers)


if __name__ == "__main__":
    main()
