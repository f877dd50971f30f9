"""The mixed-length trace of `bench.py static` through transformers' `generate`, in static batches.

    python scripts/bench_transformers.py HF_DIRECTORY --requests 64 --batch 64
    python scripts/bench.py static --requests 64        # beside it: its `continuous_tok_s` is ours on the same trace

Needs torch and transformers (the dependency group `test`). `generate` takes equal lengths: prompts are padded on the left to
their batch's longest, and every row goes on until the longest completion ends; tokens nobody asked for do not count.
"""

from __future__ import annotations

import argparse
import json
import random
import time

from benchmarks.work import mixed


def main() -> None:
    """Prints one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face directory")
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dtype", default="bfloat16", help="what the weights are computed in: its fastest on most CPUs"
    )
    args = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    trace, rng = mixed(args.requests, 1.0, args.seed), random.Random(args.seed)
    began = time.perf_counter()
    for start in range(0, len(trace), args.batch):
        group = trace[start : start + args.batch]
        width, length = max(r.prompt_tokens for r in group), max(r.output_tokens for r in group)
        ids_BT = torch.full((len(group), width), 2)
        mask_BT = torch.zeros_like(ids_BT)
        for row, request in enumerate(group):
            n = request.prompt_tokens
            ids_BT[row, width - n :] = torch.tensor([rng.randrange(100, 40000) for _ in range(n)])
            mask_BT[row, width - n :] = 1
        model.generate(
            ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=length,
            min_new_tokens=length,
            do_sample=False,
            pad_token_id=2,
        )
    seconds = time.perf_counter() - began
    wanted = sum(r.output_tokens for r in trace)
    row = {
        "engine": "transformers",
        "requests": len(trace),
        "batch": args.batch,
        "output_tok_s": round(wanted / seconds, 1),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
