"""What drafts gain: the same prompts with and without them, in turns, in one process.

    python -m scripts.benchmarks.drafts --config '{"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4}'

Tasks: `code` edits code that the prompt holds; `quotes` sums a text up in its own words; `complete` goes on with a piece of code;
`load` is 128 random tokens in and 64 out, at --requests at once, others in each round. Answers are greedy. Medians of --rounds
rounds. With `suffix` and `auto` the first three are flattered: what was answered in one round is looked up in the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from serving.engine.api.sampling_params import SamplingParams
from serving.llm import LLM

CODE = '''class Account:
    """An account that money is paid into and out of."""

    def __init__(self, owner: str, balance: float = 0.0) -> None:
        self.owner = owner
        self.balance = balance
        self.history = []

    def deposit(self, amount: float) -> None:
        if amount <= 0:
            raise ValueError("amount must be positive")
        self.balance += amount
        self.history.append(("deposit", amount))

    def withdraw(self, amount: float) -> None:
        if amount <= 0:
            raise ValueError("amount must be positive")
        if amount > self.balance:
            raise ValueError("not enough money")
        self.balance -= amount
        self.history.append(("withdraw", amount))

    def transfer(self, other: "Account", amount: float) -> None:
        self.withdraw(amount)
        other.deposit(amount)

    def report(self) -> str:
        lines = [f"{kind}: {amount}" for kind, amount in self.history]
        return "\\n".join(lines)
'''
TEXT = """The lighthouse at Cape Merrow was built in 1861 after three ships were lost in a single winter. Its tower is 38 metres
high and was made of granite that was quarried on the island of Sule, nine miles away. For the first forty years the lamp burned
rapeseed oil, and two keepers took turns to wind the clockwork that turned the lens. In 1904 the lamp was converted to paraffin,
and the beam could be seen for nineteen miles in clear weather. During the war the light was lit only when a convoy was expected.
The last keeper, Agnes Dunmore, left the station on 3 May 1987, when the light became automatic. She had kept a diary for thirty
years, and it is now in the museum of the harbour town. The diary records 412 storms, eleven rescues and the names of every ship
that answered the light with its horn."""
STUB = '''def merge_intervals(intervals):
    """Merge all overlapping intervals and return a list of merged intervals sorted by start."""
    if not intervals:
        return []
    intervals.sort(key=lambda interval: interval[0])
    merged = [intervals[0]]
'''
STUB_2 = '''import csv


def read_table(path):
    """Read a CSV file and return a list of dictionaries, one a row, with numbers converted to float."""
    rows = []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
'''
TASKS: dict[str, list[str]] = {
    "code": [
        f"Here is a Python class:\n\n{CODE}\nWrite the whole class again with the method `withdraw` renamed to `take_out` "
        "everywhere. Change nothing else.",
        f"{CODE}\nRepeat this code exactly, but add a type annotation `list` to `self.history`.",
    ],
    "quotes": [
        f"{TEXT}\n\nSum the text up in five bullet points. Each point must quote a full sentence of the text word for word.",
        f"{TEXT}\n\nWhich sentences of the text name a year or a date? Quote each of them in full.",
    ],
    "complete": [STUB, STUB_2],
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--config", required=True, help="a speculative_config")
    parser.add_argument("--tasks", default="code,quotes")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 16, 64], help="of the task load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--max-num-seqs", type=int, default=64, help="few make a start with a larger model short")
    parser.add_argument(
        "--wait", action="store_true", help="wait for a line on standard input once the engines are ready"
    )
    args = parser.parse_args(arguments)
    settings: dict[str, Any] = {"progress": False, "kv_cache_memory": "512MiB"}
    settings |= {"max_model_len": args.max_model_len, "max_num_seqs": args.max_num_seqs}
    engines = {
        "plain": LLM(args.model, **settings),
        "drafts": LLM(args.model, speculative_config=json.loads(args.config), **settings),
    }
    if args.wait:
        print("ready", flush=True)
        sys.stdin.readline()
    for task in args.tasks.split(","):
        if task != "load":
            found = compare(
                engines, lambda turn, task=task: TASKS[task], task != "complete", args.max_tokens, args.rounds
            )
            print(json.dumps({"task": task} | found), flush=True)
            continue
        for count in args.requests:
            found = compare(
                engines, lambda turn, count=count: random_prompts(engines, count, turn), False, 64, args.rounds
            )
            print(json.dumps({"task": f"load {count}"} | found), flush=True)
    for llm in engines.values():
        llm.shutdown()


def random_prompts(engines: dict[str, LLM], count: int, turn: int) -> list[dict[str, list[int]]]:
    """Prompts of 128 tokens that no round before had."""
    rng, vocab = random.Random(1000 * turn + count), engines["plain"].info.vocab_size
    return [{"prompt_token_ids": [rng.randrange(vocab // 2) for _ in range(128)]} for _ in range(count)]


def compare(
    engines: dict[str, LLM], prompts_of: Callable[[int], list[Any]], chat: bool, limit: int, rounds: int
) -> dict[str, Any]:
    """Tokens a second of each engine (medians), their ratio by round, and what became of the drafts. The first round is not
    counted: it fills the prefix caches of both.

    Args:
        prompts_of: a round's prompts.
    """
    rates: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[tuple[int, ...]]] = {}
    before = engines["drafts"].stats()
    for turn in range(rounds + 1):
        prompts = prompts_of(turn)
        for name in sorted(engines, reverse=turn % 2 == 1):
            together = not chat and isinstance(prompts[0], dict)
            seconds, tokens = run(engines[name], prompts, chat, limit, together)
            texts[name] = tokens
            if turn:
                rates[name].append(sum(map(len, tokens)) / seconds)
    after = engines["drafts"].stats()
    drafts, verified, accepted = (
        getattr(after, field) - getattr(before, field)
        for field in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    medians = {name: round(statistics.median(found), 1) for name, found in rates.items()}
    ratios = [round(b / a, 3) for a, b in zip(rates["plain"], rates["drafts"], strict=True)]
    return {
        **medians,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": ratios,
        "rows_with_drafts": drafts,
        "verified": verified,
        "accepted": accepted,
        "tokens": sum(map(len, texts["drafts"])),
        "same_answers": texts["plain"] == texts["drafts"],
    }


def run(llm: LLM, prompts: list[Any], chat: bool, limit: int, together: bool) -> tuple[float, list[tuple[int, ...]]]:
    """Seconds, and the token ids of each answer. One request after the other, unless they are to run together."""
    params = SamplingParams(temperature=0.0, max_tokens=limit, ignore_eos=not chat)
    began = time.perf_counter()
    if together:
        found = llm.generate(prompts, dataclasses.replace(params), use_tqdm=False)
    elif chat:
        found = [llm.chat([{"role": "user", "content": text}], params, use_tqdm=False)[0] for text in prompts]
    else:
        found = [llm.generate([text], params, use_tqdm=False)[0] for text in prompts]
    seconds = time.perf_counter() - began
    return seconds, [tuple(result.outputs[0].token_ids) for result in found]


if __name__ == "__main__":
    main(sys.argv[1:])
