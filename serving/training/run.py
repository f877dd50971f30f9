"""A run: steps, evaluations, checkpoints, and in the end what was learned, in files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from serving.training import export
from serving.training.checkpoints import Checkpoints, digest
from serving.training.gguf_files import has_gguf_base, write_gguf, write_merged_gguf
from serving.training.prepare import Run, prepare
from serving.training.record import Line, Record
from serving.training.settings import Settings
from serving.training.steps import learning_rate

CHECKPOINTS = "checkpoints"
MERGED = "merged"
GGUF = "adapter.gguf"
MERGED_GGUF = "merged.gguf"


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a run ended.

    Attributes:
        done: all steps were made and `out` holds what was learned; else it goes on with `resume`.
        step: steps made, those before it was resumed included.
        lines: what was recorded.
    """

    done: bool
    step: int
    lines: tuple[Line, ...]


def finetune(
    settings: Settings,
    *,
    merge: str | None = None,
    gguf: bool = False,
    stop: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = print,
) -> Finished:
    """Trains, and writes an adapter directory (LoRA) or a model directory to `settings.out`.

    Args:
        merge: write the base with the adapter in it too, to `merged` below `out`, in this dtype.
        gguf: write the adapter as `adapter.gguf` too.
        stop: asked after each step; True ends the run with a checkpoint, to be resumed.
        tell: what shows a line to people.
    Raises:
        ValueError: in a sentence: a model, a file, a line or a setting that cannot be used.
    """
    folder = settings.out / CHECKPOINTS
    if not settings.resume and settings.out.exists() and any(settings.out.iterdir()):
        raise ValueError(f"{settings.out} is not empty: give another --out, or --resume to go on with the run in it.")
    if settings.resume and not folder.is_dir():
        raise ValueError(f"{folder} does not exist: there is no run to go on with.")
    began = time.monotonic()
    run = prepare(settings)
    files = [*settings.data, *([settings.eval_data] if settings.eval_data else [])]
    settings.out.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder, settings.continued() | {"data": digest(files)})
    try:
        tell(_described(run, settings))
        done, step, record = _train(run, settings, checkpoints, began, stop, tell)
    finally:
        checkpoints.close()
    if done:
        _write(run, settings, merge, gguf, tell)
    return Finished(done, step, tuple(record.lines))


def _described(run: Run, settings: Settings) -> str:
    count = sum(x.size for x in jax.tree.leaves(run.trained))
    rows = run.data.training
    how = (
        "all parameters"
        if settings.lora is None
        else f"LoRA of rank {settings.lora.rank} on {len(run.trained)} matrices"
    )
    return (
        f"{run.opened.model_id}: {how}, {count:,} numbers to learn; {len(rows)} rows with {rows.num_tokens:,} tokens, "
        f"{rows.num_targets:,} of them targets; {run.data.steps} steps of {settings.batch * settings.accumulate} rows"
    )


def _train(
    run: Run,
    settings: Settings,
    checkpoints: Checkpoints,
    began: float,
    stop: Callable[[], bool],
    tell: Callable[[str], None],
) -> tuple[bool, int, Record]:
    """(whether all steps are made, how many are, the record)."""
    steps, rate = run.data.steps, learning_rate(settings.optimizer, run.data.steps)
    state, step, compiled = run.programs.start(run.trained), 0, False
    if settings.resume and (newest := checkpoints.newest()) is not None:
        run.trained, state = checkpoints.restore(newest, run.trained, state)
        step = newest
        tell(f"going on behind step {step}")
    record = Record(settings.out, steps, step, tell)
    since = _Since()
    while step < steps:
        batches, targets, tokens = run.data.batches(step)
        key = jax.random.fold_in(jax.random.key(settings.seed), step)
        found, summed = run.programs.gradients(run.trained, run.frozen, batches, targets, key)
        run.trained, state, norm = run.programs.update(run.trained, state, found)
        since.add(summed, targets, tokens)
        if not compiled:  # the first step's time is the compiler's
            jax.block_until_ready(norm)
            compiled = True
            since.begin()
        step += 1
        late = settings.minutes is not None and time.monotonic() - began > settings.minutes * 60
        ends = step == steps or late or stop()
        evaluates = run.data.evaluation is not None and (
            step == steps or (settings.eval_every > 0 and step % settings.eval_every == 0)
        )
        if step % settings.log_every == 0 or step == 1 or ends or evaluates:
            loss, steps_per_s, tokens_per_s = since.taken()
            line = Line(step, loss, float(np.asarray(rate(step - 1))), float(norm), steps_per_s, tokens_per_s)
            if not np.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {step}: lower --learning-rate, or look at the data.")
            if evaluates:
                line = dataclasses.replace(line, **_evaluated(run))
            record.add(line)
            since = _Since()
        if ends or (settings.save_every and step % settings.save_every == 0):
            checkpoints.save(step, run.trained, state)
            since.begin()
        if ends and step < steps:
            tell(f"stopped behind step {step} of {steps}: --resume goes on from here")
            return False, step, record
    return True, step, record


class _Since:
    """Sums since the last line."""

    def __init__(self) -> None:
        self._sums: list[Any] = []
        self._targets = self._tokens = 0
        self.begin()

    def begin(self) -> None:
        """Time that passed until now is not the steps'."""
        self._began, self._timed, self._timed_tokens = time.monotonic(), 0, 0

    def add(self, summed: Any, targets: int, tokens: int) -> None:
        self._sums.append(summed)
        self._targets, self._timed = self._targets + targets, self._timed + 1
        self._timed_tokens += tokens

    def taken(self) -> tuple[float, float | None, float | None]:
        """(mean loss, steps a second, tokens a second); None where no time was taken."""
        loss = float(np.sum([np.asarray(s) for s in self._sums])) / max(1, self._targets)
        seconds = max(1e-9, time.monotonic() - self._began)
        if not self._timed:
            return loss, None, None
        return loss, self._timed / seconds, self._timed_tokens / seconds


def _evaluated(run: Run) -> dict[str, float]:
    assert run.data.evaluation is not None
    loss, right = run.programs.evaluate(run.trained, run.frozen, run.data.evaluation_batches())
    targets = run.data.evaluation.num_targets
    return {"eval_loss": loss / targets, "eval_accuracy": right / targets}


def _write(run: Run, settings: Settings, merge: str | None, gguf: bool, tell: Callable[[str], None]) -> None:
    host: dict[str, Any] = jax.tree.map(np.asarray, run.trained)
    dtype = merge or ("bfloat16" if settings.dtype == "auto" else settings.dtype)
    if settings.lora is None:
        export.write_model(settings.out, export.trained(run.opened, run.recipes, host), run.opened, dtype)
        export.write_text_side(settings.out, run.opened, run.tokenizer, run.template)
        tell(f"written: the model, as {dtype}, to {settings.out}. Serve it with --model {settings.out}")
        return
    turned = any(piece.turned and piece.name in host for piece in export.pieces_of(run.recipes))
    base = run.opened.source.name or run.opened.model_id
    export.write_peft(settings.out, host, settings.lora, base=base, turned=turned, generates=run.task == "generate")
    export.write_text_side(settings.out, run.opened, run.tokenizer, run.template)
    tell(f"written: the adapter to {settings.out}. Serve it with --enable-lora --lora-modules NAME={settings.out}")
    if gguf:
        write_gguf(settings.out / GGUF, host, settings.lora, run.opened)
        tell(f"written: the adapter to {settings.out / GGUF}")
    if merge is not None:
        out = settings.out / MERGED
        export.write_model(out, export.merged(run.opened, run.recipes, host, settings.lora), run.opened, dtype)
        export.write_text_side(out, run.opened, run.tokenizer, run.template)
        tell(f"written: the base with the adapter in it, as {dtype}, to {out}. Serve it with --model {out}")
        if gguf and has_gguf_base(run.opened):
            out = settings.out / MERGED_GGUF
            count = write_merged_gguf(out, host, settings.lora, run.opened, dtype)
            tell(f"written: the same as GGUF, {count} tensors of it anew, to {out}")
