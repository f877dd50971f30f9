"""`python -m serving.finetune`: trains a LoRA adapter, or all of a model, on JSONL data, and writes what a server loads.

    python -m serving.finetune --data facts.jsonl --out adapters/facts --epochs 30

Any decoder that can be served can be trained, and embedding models on pairs. docs/finetune.md says what the data looks like.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.training.settings import Settings


def parser() -> argparse.ArgumentParser:
    """The flags. Their defaults are those of `serving.training.settings`."""
    flags = argparse.ArgumentParser(
        prog="python -m serving.finetune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _data_flags(flags.add_argument_group("data"))
    _what_flags(flags.add_argument_group("what is trained"))
    _how_flags(flags.add_argument_group("how"))
    _out_flags(flags.add_argument_group("what comes out"))
    return flags


def _data_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSONL: messages, text, prompt and completion, or pairs",
    )
    add("--eval-data", type=Path, metavar="FILE", help="JSONL to evaluate on")
    add(
        "--eval-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="evaluate on this share of --data instead of training on it",
    )
    add("--max-length", type=int, default=1024, help="tokens of a row; longer examples are cut (default: %(default)s)")
    add("--no-packing", action="store_true", help="one example a row")
    add("--chat-template", help="a file, or Jinja text, instead of the model's own template")
    add("--chat-template-kwargs", type=json.loads, default={}, metavar="JSON", help="more variables for the template")


def _what_flags(group: Any) -> None:
    add = group.add_argument
    add("--model", help="GGUF file, directory or hub id; default: the default model")
    add(
        "--task",
        choices=("generate", "embed"),
        help="predict tokens, or bring pairs together (default: what the model is for)",
    )
    add("--full", action="store_true", help="train all parameters instead of a LoRA adapter")
    add("--lora-rank", type=int, default=16, metavar="R", help="(default: %(default)s)")
    add("--lora-alpha", type=float, default=32.0, metavar="ALPHA", help="(default: %(default)s)")
    add("--lora-dropout", type=float, default=0.0, metavar="SHARE", help="(default: %(default)s)")
    add(
        "--lora-targets", nargs="+", default=["all-linear"], metavar="NAME",
        help="names of modules (q_proj v_proj ...), or one regular expression for whole paths (default: all-linear)",
    )  # fmt: skip
    add("--rslora", action="store_true", help="scale by alpha / sqrt(r) instead of alpha / r")
    add("--quantization", choices=("int8", "int4"), help="of the frozen base under LoRA (QLoRA)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base and of products; what is trained is float32",
    )


def _how_flags(group: Any) -> None:
    add = group.add_argument
    add("--epochs", type=float, default=3.0, help="(default: %(default)s)")
    add("--max-steps", type=int, help="instead of --epochs")
    add("--batch", type=int, default=4, help="rows of one program call (default: %(default)s)")
    add("--accumulate", type=int, default=1, help="calls a step (default: %(default)s)")
    add("--learning-rate", type=float, default=2e-4, help="at its highest (default: %(default)s)")
    add(
        "--schedule",
        choices=("cosine", "linear", "constant"),
        default="cosine",
        help="how it falls (default: %(default)s)",
    )
    add(
        "--warmup",
        type=float,
        default=0.03,
        help="steps in which it rises; below 1 a share of all (default: %(default)s)",
    )
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--max-grad-norm", type=float, default=1.0, help="0 for no clip (default: %(default)s)")
    add("--temperature", type=float, default=0.05, help="of the contrastive loss (default: %(default)s)")
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help="layers in the backward pass (default: where memory asks for it)",
    )
    add("--mesh", help='e.g. "data=2,model=4" (default: one device)')
    add("--cpu-devices", type=int, help="make this many CPU devices, to try a mesh without others")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--minutes", type=float, help="after so long save a checkpoint and end; --resume goes on")
    add("--compile-cache", help="a folder to keep compiled programs in, for the next run")


def _out_flags(group: Any) -> None:
    add = group.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the adapter (or model), checkpoints, metrics.csv, loss.svg",
    )
    add("--resume", action="store_true", help="go on with the run in --out")
    add("--log-every", type=int, default=10, metavar="STEPS", help="(default: %(default)s)")
    add("--eval-every", type=int, default=0, metavar="STEPS", help="besides the last step (default: never)")
    add("--save-every", type=int, default=0, metavar="STEPS", help="besides the last step (default: never)")
    add(
        "--merge",
        nargs="?",
        const="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="write the base with the adapter in it too",
    )
    add(
        "--gguf",
        action="store_true",
        help="write the adapter as adapter.gguf, too; with --merge merged.gguf of a GGUF base",
    )
    add(
        "--serve-to",
        metavar="URL",
        help="load the adapter into this running server (started with --enable-lora --lora-folder)",
    )
    add("--serve-name", help="the adapter's name there (default: the name of --out)")
    add("--serve-path", type=Path, help="where the server finds it, if not where it is here")
    add("--api-key", default=os.environ.get("JAXSERVE_API_KEY"), help="for --serve-to (default: $JAXSERVE_API_KEY)")


def settings_of(arguments: argparse.Namespace) -> Settings:
    """What the flags say.

    Raises:
        ValueError: values that do not fit together.
    """
    from serving.training.lora import LoraSettings
    from serving.training.settings import Optimizer, Settings

    a = arguments
    targets = a.lora_targets
    one = len(targets) == 1 and (
        targets[0] == "all-linear" or not targets[0].replace("_", "").replace(".", "").isalnum()
    )
    lora = LoraSettings(a.lora_rank, a.lora_alpha, a.lora_dropout, a.rslora, targets[0] if one else tuple(targets))
    if a.full and (a.merge or a.gguf or a.serve_to):
        raise ValueError("--full writes a whole model: --merge, --gguf and --serve-to are for adapters.")
    return Settings(
        data=tuple(a.data),
        out=a.out,
        model=a.model,
        eval_data=a.eval_data,
        eval_share=a.eval_share,
        task=a.task,
        chat_template=a.chat_template,
        template_arguments=a.chat_template_kwargs,
        lora=None if a.full else lora,
        quantization=a.quantization,
        dtype=a.dtype,
        mesh=a.mesh,
        epochs=a.epochs,
        max_steps=a.max_steps,
        batch=a.batch,
        accumulate=a.accumulate,
        max_length=a.max_length,
        packing=not a.no_packing,
        recompute=a.recompute,
        optimizer=Optimizer(a.learning_rate, a.schedule, a.warmup, a.weight_decay, max_grad_norm=a.max_grad_norm),
        temperature=a.temperature,
        seed=a.seed,
        log_every=a.log_every,
        eval_every=a.eval_every,
        save_every=a.save_every,
        minutes=a.minutes,
        resume=a.resume,
    )


def main(argv: list[str] | None = None) -> None:
    """Command line; exits with 1 and a sentence where something is wrong, with 3 where a run ended before its last step."""
    arguments = parser().parse_args(argv)
    from serving.memory import keep_freed

    keep_freed()
    import jax

    if arguments.cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    if arguments.compile_cache:
        jax.config.update("jax_compilation_cache_dir", arguments.compile_cache)
    stopping: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (stopping.append(number), signal.signal(number, signal.SIG_DFL)))
    try:
        settings = settings_of(arguments)
        from serving.training.run import finetune
        from serving.training.upload import serve_to

        finished = finetune(
            settings, merge=arguments.merge, gguf=arguments.gguf, stop=lambda: bool(stopping), tell=_tell
        )
        if not finished.done:
            sys.exit(3)
        if arguments.serve_to:
            name = arguments.serve_name or arguments.out.name
            _tell(
                serve_to(arguments.serve_to, name, arguments.serve_path or arguments.out.resolve(), arguments.api_key)
            )
    except ModuleNotFoundError as error:
        if error.name != "optax":
            raise
        print("error: training needs the extra `train`: in a checkout, pip install -e '.[train]'", file=sys.stderr)
        sys.exit(1)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _tell(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
