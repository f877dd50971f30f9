"""Steps a second of LoRA training, ours against transformers with peft on the same machine, in turns in one process.

    python scripts/bench_finetune.py            # needs what the tests need: torch, transformers, peft

Both train the same pairs of the default model (or --model) on the same rows, each one text without padding, of which the last part
is learned; forward, backward, clip and AdamW. Compiling and the first step of either are not counted. With --data a step has the
chats of a file that our rows are packed from, and the other side gets the same ones, each a row that is padded to the longest.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from serving.memory import keep_freed

keep_freed()  # as the training does, for both

import jax  # noqa: E402
import numpy as np  # noqa: E402

from serving.training import export  # noqa: E402
from serving.training.examples import Example  # noqa: E402
from serving.training.lora import LoraSettings  # noqa: E402
from serving.training.packing import pack  # noqa: E402
from serving.training.prepare import prepare  # noqa: E402
from serving.training.settings import Optimizer, Settings  # noqa: E402

LORA = LoraSettings(16, 32.0)


def ours(folder: pathlib.Path, arguments: argparse.Namespace) -> tuple[Callable[[int], float], Any]:
    """(a step that returns its loss, the run)."""
    data = arguments.data or folder / "data.jsonl"
    if arguments.data is None:
        data.write_text(json.dumps({"text": "What is measured comes from rows()."}))
    settings = Settings(
        (data,), folder / "out", arguments.model, lora=LORA, dtype=arguments.dtype, max_steps=100,
        quantization=arguments.quantization, batch=arguments.batch, max_length=arguments.length,
        optimizer=Optimizer(1e-4, "constant", warmup=0.0),
    )  # fmt: skip
    run = prepare(settings)
    state = run.programs.start(run.trained)

    def step(index: int) -> float:
        nonlocal state
        batch = rows(run, arguments, index)
        found, summed = run.programs.gradients(run.trained, run.frozen, [batch], int(batch[5].sum()), jax.random.key(0))
        run.trained, state, norm = run.programs.update(run.trained, state, found)
        jax.block_until_ready((run.trained, norm))
        return float(summed) / float(batch[5].sum())

    return step, run


def rows(run: Any, arguments: argparse.Namespace, index: int) -> Any:
    """The batch of a step."""
    if arguments.data is not None:
        return run.data.batches(index % run.data.steps)[0][0]
    rng = np.random.default_rng(index)
    learned = np.arange(arguments.length) >= arguments.length * (1.0 - arguments.learned)
    tokens = rng.integers(100, 30000, (arguments.batch, arguments.length)).astype(np.int32)
    packed = pack([Example(row, learned, 0) for row in tokens], arguments.length, seed=index)
    return packed.take(np.arange(arguments.batch))


def apart(batch: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, labels, which of them are there) of the same texts, each a row of its own, padded to the longest."""
    tokens_BS, segments_BS, _, place_BM, target_BM, weight_BM = batch
    labels_BS = np.full(tokens_BS.shape, -100, np.int64)
    row_BM = np.broadcast_to(np.arange(len(tokens_BS))[:, None], place_BM.shape)
    there_BM = weight_BM > 0
    labels_BS[row_BM[there_BM], place_BM[there_BM] + 1] = target_BM[there_BM]
    texts = [
        (tokens_BS[row, segments_BS[row] == text], labels_BS[row, segments_BS[row] == text])
        for row in range(len(tokens_BS))
        for text in range(1, int(segments_BS[row].max()) + 1)
    ]
    longest = max(len(tokens) for tokens, _ in texts)
    found = [
        np.stack([np.pad(part, (0, longest - len(part)), constant_values=value) for part in parts])
        for parts, value in zip(zip(*texts, strict=True), (0, -100), strict=True)
    ]
    there = np.arange(longest) < np.array([len(tokens) for tokens, _ in texts])[:, None]
    return found[0].astype(np.int64), found[1], there


def theirs(folder: pathlib.Path, run: Any, arguments: argparse.Namespace) -> Callable[[int], float]:
    """The same by transformers and peft, from the same base and the same start."""
    import peft
    import torch
    import transformers

    base = folder / "base"
    export.write_model(base, export.merged(run.opened, run.recipes, {}, LORA), run.opened, "float32")
    export.write_peft(folder / "start", jax.tree.map(np.asarray, run.trained), LORA, base=str(base))
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(folder / "start"), is_trainable=True)
    learned = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(learned, lr=1e-4, weight_decay=0.0)
    half = arguments.dtype == "bfloat16"

    def step(index: int) -> float:
        tokens, labels, there = map(torch.from_numpy, apart(rows(run, arguments, index)))
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            loss = model(tokens, attention_mask=None if there.all() else there, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        adamw.step()
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--data", type=pathlib.Path, help="chats to train on (default: random rows without padding)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of products, for both")
    parser.add_argument("--quantization", choices=("int8", "int4"), help="of our base alone")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (default: %(default)s)")
    parser.add_argument("--learned", type=float, default=0.25, help="share of them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a turn (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--warm", action="store_true", help="only compile ours, for the next run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        step, run = ours(folder, arguments)
        first = [theirs(folder, run, arguments)] if not arguments.warm else []
        sides = {"ours": step} | ({"peft": first[0]} if first else {})
        losses = {side: take(0) for side, take in sides.items()}
        print("loss of the first step:", ", ".join(f"{side} {loss:.5f}" for side, loss in losses.items()), flush=True)
        if arguments.warm:
            return
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for turn in range(arguments.turns):
            for side, take in sides.items():
                began = time.perf_counter()
                for index in range(arguments.steps):
                    take(1 + turn * arguments.steps + index)
                rates[side].append(arguments.steps / (time.perf_counter() - began))
        for side, found in rates.items():
            print(f"{side}: {', '.join(f'{rate:.3f}' for rate in found)} steps/s", flush=True)
        ratios = sorted(mine / other for mine, other in zip(rates["ours"], rates["peft"], strict=True))
        print(f"ours / peft: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; middle {ratios[len(ratios) // 2]:.2f}")


if __name__ == "__main__":
    main()
