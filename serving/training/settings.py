"""What a training run is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from serving.training.lora import LoraSettings

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) behind a clip of the gradients' norm.

    Attributes:
        learning_rate: at its highest.
        schedule: how it falls from there to 0 at the last step: of `SCHEDULES`.
        warmup: steps in which it rises from 0; below 1 a share of all steps.
        max_grad_norm: gradients longer than this are scaled down to it; 0 for no limit.
    """

    learning_rate: float = 2e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        model: as `--model` of the server; None for the default model.
        data: files of examples, JSONL.
        out: folder for what comes out, checkpoints included.
        eval_data: a file to evaluate on; None for none.
        eval_share: of the training data that is evaluated on instead, from 0 to 1.
        task: "generate" (predict tokens) or "embed" (pairs); None for what the model is for.
        lora: None to train all parameters.
        quantization: of the frozen base, as the server's: "int8", "int4" or None.
        dtype: of the frozen base, and of products where that is not a CPU.
        mesh: as `--mesh`; None for one device.
        epochs, max_steps: how long; steps win where they are given.
        batch, accumulate: rows of a program call, and calls a step.
        max_length: tokens of a row.
        recompute: layers in the backward pass; None where the activations would not fit.
        temperature: of the contrastive loss.
        log_every, eval_every, save_every: steps; 0 for never (the last step is always saved).
        minutes: after so long a checkpoint is saved and the run ends, to be resumed; None for no limit.
        resume: go on from the newest checkpoint in `out`.
    """

    data: tuple[Path, ...]
    out: Path
    model: str | None = None
    eval_data: Path | None = None
    eval_share: float = 0.0
    task: str | None = None
    chat_template: str | None = None
    template_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora: LoraSettings | None = dataclasses.field(default_factory=LoraSettings)
    quantization: str | None = None
    dtype: str = "auto"
    mesh: str | None = None
    epochs: float = 3.0
    max_steps: int | None = None
    batch: int = 4
    accumulate: int = 1
    max_length: int = 1024
    packing: bool = True
    recompute: bool | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    temperature: float = 0.05
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    save_every: int = 0
    minutes: float | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate", "max_length", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1.")
        if self.optimizer.schedule not in SCHEDULES:
            raise ValueError(f"--schedule is {self.optimizer.schedule!r}; there are {', '.join(SCHEDULES)}.")
        if self.lora is None and self.quantization is not None:
            raise ValueError(
                "--full trains every weight, which a quantized model does not have: leave --quantization out."
            )
        if self.lora is not None and (self.lora.rank < 1 or not 0.0 <= self.lora.dropout < 1.0):
            raise ValueError(
                f"--lora-rank is {self.lora.rank}, --lora-dropout {self.lora.dropout}; from 1, and from 0 below 1."
            )
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"--eval-share is {self.eval_share}; it must be from 0 to below 1.")

    def continued(self) -> dict[str, Any]:
        """What a resumed run must share with the one that it goes on from, as JSON."""
        names = (
            "model", "task", "chat_template", "template_arguments", "quantization", "dtype", "mesh", "epochs", "max_steps", "batch",
            "accumulate", "max_length", "packing", "temperature", "seed", "eval_share",
        )  # fmt: skip
        fields = {name: getattr(self, name) for name in names}
        fields["lora"] = None if self.lora is None else dataclasses.asdict(self.lora)
        return fields | {"optimizer": dataclasses.asdict(self.optimizer)}
