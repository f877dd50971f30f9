"""What adapters cost: the same load on the base alone and over adapters, in turns, in one process.

    python -m scripts.benchmarks.adapters --requests 64 --adapters 8 --rank 16

`plain` is an engine without --enable-lora, `unused` one with it that nobody asks for an adapter, `adapters` the same with every
request for one of them. Adapters are random ones for all linear weights. Each round sends other prompts; medians of --rounds. Then:
seconds to load an adapter from its files, and to a first token with an adapter that is on the device, and with one that is in host
memory.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from serving import LLM, LoRARequest, SamplingParams


def write(folder: pathlib.Path, llm: LLM, rank: int, seed: int) -> LoRARequest:
    """A random adapter of every projection, as peft writes one."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    for site in llm._started.engine.runner.executor.adapters.room.sites:  # type: ignore[union-attr]
        for piece in site.recipe.pieces if site.path.startswith("layers.") else ():
            module = f"base_model.model.{piece.name.removesuffix('.weight')}"
            outputs, inputs = piece.shape
            tensors[f"{module}.lora_A.weight"] = (rng.standard_normal((rank, inputs)) * inputs**-0.5).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((outputs, rank)) * 0.01).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank}))
    return LoRARequest(folder.name, seed, str(folder))


def rate(llm: LLM, args: argparse.Namespace, seed: int, adapters: list[LoRARequest]) -> float:
    """Tokens a second."""
    rng = np.random.default_rng(seed)
    prompts = [
        {"prompt_token_ids": rng.integers(100, 40_000, args.prompt_tokens).tolist()} for _ in range(args.requests)
    ]
    params = SamplingParams(temperature=0, max_tokens=args.output_tokens, ignore_eos=True)
    given: Any = [adapters[i % len(adapters)] for i in range(args.requests)] if adapters else None
    began = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False, lora_request=given)
    return args.requests * args.output_tokens / (time.perf_counter() - began)


def first_token(llm: LLM, adapter: LoRARequest, seed: int) -> float:
    """Seconds to one token behind a short prompt."""
    began = time.perf_counter()
    prompt = [int(t) for t in np.random.default_rng(seed).integers(100, 40_000, 16)]
    llm.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1), use_tqdm=False, lora_request=adapter)
    return time.perf_counter() - began


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--step-tokens", type=int, default=256, help="max_num_batched_tokens; more are more programs")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    settings: dict[str, Any] = {
        "progress": False,
        "kv_cache_memory": "512MiB",
        "max_model_len": 1024,
        "max_num_seqs": 64,
        "max_num_batched_tokens": args.step_tokens,
    }
    plain = LLM(args.model, **settings)
    lora = LLM(
        args.model, enable_lora=True, max_loras=args.adapters, max_lora_rank=args.rank, max_cpu_loras=args.adapters + 1,
        **settings,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        made = [write(pathlib.Path(folder) / f"a{i}", lora, args.rank, i) for i in range(args.adapters + 1)]
        loads = []
        for adapter in made:
            began = time.perf_counter()
            lora._service.adapters.load(adapter.lora_name, adapter.lora_path)
            loads.append(time.perf_counter() - began)
        rates: dict[str, list[float]] = {"plain": [], "unused": [], "adapters": []}
        for turn in range(args.rounds + 1):  # the first warms up
            found = {
                "plain": rate(plain, args, turn, []),
                "unused": rate(lora, args, turn, []),
                "adapters": rate(lora, args, turn, made[:-1]),
            }
            for name, value in found.items():
                rates[name] += [value] if turn else []
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratios = {
            name: round(statistics.median(b / a for a, b in zip(rates["plain"], rates[name], strict=True)), 3)
            for name in ("unused", "adapters")
        }
        here = [first_token(lora, made[-2], seed) for seed in range(100, 105)]
        # One more adapter than there are slots: each of these takes the one that was used longest ago.
        switched = [first_token(lora, made[(i - 1) % len(made)], 200 + i) for i in range(len(made))]
    print(json.dumps({
        "requests": args.requests, "adapters": args.adapters, "rank": args.rank,
        **{f"{name}_tokens_s": round(value, 1) for name, value in medians.items()},
        "ratio": ratios, "load_s": round(statistics.median(loads), 3),
        "first_token_ms": round(1000 * statistics.median(here), 1),
        "first_token_from_host_memory_ms": round(1000 * statistics.median(switched[1:]), 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
