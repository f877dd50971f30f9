"""Whether a request's tokens depend on what else runs: `python scripts/invariance.py [--model ...] [--prompts 30]`.

Greedy tokens of each prompt and their log-probabilities alone, and again among 7 and 63 others, behind a cached prefix, cut into
pieces of at most 64 tokens, and preempted in a pool that is too small. Prints a JSON object a way of running: how many prompts gave
the same as alone, log-probabilities to the last bit, and of the others where they parted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

SMALL = 64  # tokens of a piece


def texts(count: int) -> list[str]:
    """Beginnings of this repository's documents, 40 to 1,200 characters long."""
    pages = sorted((ROOT / "docs").glob("*.md"))
    whole = [page.read_text(encoding="utf-8") for page in pages]
    return [
        whole[i % len(whole)][150 * (i // len(whole)) :][: 40 + 1160 * i // max(count - 1, 1)] for i in range(count)
    ]


Row = list[tuple[int, float]]
"""Tokens, and how likely each was."""


def ways(model: str | None, prompts: list[str], tokens: int, pool: int) -> Iterator[tuple[str, list[Row]]]:
    """(name, what each prompt gave) of each way of running, "alone" first."""
    from serving.engine.api.sampling_params import SamplingParams
    from serving.llm import LLM

    greedy = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=0)

    def run(llm: Any, batch: list[str]) -> list[Row]:
        found = [output.outputs[0] for output in llm.generate(batch, greedy, use_tqdm=False)]
        return [[(t, p[t].logprob) for t, p in zip(one.token_ids, one.logprobs, strict=True)] for one in found]

    with LLM(model, enable_prefix_caching=False, max_num_seqs=64) as llm:
        yield "alone", [run(llm, [prompt])[0] for prompt in prompts]
        eights = [run(llm, prompts[i : i + 8]) for i in range(0, len(prompts), 8)]
        yield "among 7 others", [row for group in eights for row in group]
        many = (prompts * -(-64 // len(prompts)))[: max(64, len(prompts))]
        yield "among 63 others", run(llm, many)[: len(prompts)]
    with LLM(model, max_num_seqs=64) as llm:
        run(llm, prompts)
        yield "behind a cached prefix", run(llm, prompts)
    with LLM(model, enable_prefix_caching=False, max_num_seqs=SMALL // 2, max_num_batched_tokens=SMALL) as llm:
        yield f"in pieces of {SMALL}", run(llm, prompts)
    with LLM(model, max_num_seqs=64, kv_cache_memory=pool) as llm:
        found = run(llm, prompts)
        yield f"preempted ({llm.stats().num_preemptions} times)", found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="scripts/invariance.py", description=__doc__)
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: the default model")
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=48, help="of each completion (default: 48)")
    parser.add_argument("--pool", type=int, default=12 << 20, help="bytes of the pool that is too small")
    arguments = parser.parse_args()
    alone: list[Row] = []
    for name, rows in ways(arguments.model, texts(arguments.prompts), arguments.tokens, arguments.pool):
        alone = alone or rows
        parted = {
            i: next(at for at, (a, b) in enumerate(zip(row, own, strict=True)) if a != b)
            for i, (row, own) in enumerate(zip(rows, alone, strict=True))
            if row != own
        }
        print(
            json.dumps({"way": name, "prompts": len(rows), "same": len(rows) - len(parted), "parted": parted}),
            flush=True,
        )


if __name__ == "__main__":
    main()
