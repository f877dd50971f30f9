"""`python -m serving.plan`: what a server would be, before there is hardware for it."""

from __future__ import annotations

import argparse
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

from serving.boot.engine_flags import add_settings
from serving.engine.api.config import EngineConfig
from serving.plan import chips, facts, topology

SETTINGS = (
    "mesh", "dtype", "quantization", "kv_cache_dtype", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "page_size",
    "speculative_config",
    "enable_lora", "max_loras", "max_lora_rank", "lora_dtype",
    "mm_encoder_cache_gb", "language_model_only",
)  # fmt: skip
"""Of the server's settings, those that a plan has too."""

PLANNED = {
    "mesh": "auto", "quantization": "none", "max_num_seqs": 256, "max_num_batched_tokens": 4096, "max_model_len": 8192,
}  # fmt: skip
"""Where a plan decides what a server decides when it sees its devices and its model."""


def build_parser() -> argparse.ArgumentParser:
    """The command's flags; those that the server has too mean the same."""
    parser = argparse.ArgumentParser(
        prog="python -m serving.plan",
        description="Compiles the server's programs for a topology from a model's configuration alone, and says what fits, "
        "how many requests run at once and how fast it could be.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help=f"a config.json, a folder, a model id, or one of {', '.join(facts.known())}"
    )
    parser.add_argument(
        "--topology", nargs="+", required=True, help="v5e:4x4, v5p:2x2x2, v6e:2x4, h200:8, cpu:4; several with --sweep"
    )
    defaults = vars(EngineConfig()) | PLANNED
    add_settings(
        parser,
        {name: defaults[name] for name in SETTINGS},
        help={
            "mesh": "as the server's; auto puts every device on the model axis",
            "dtype": "of weights and activations; auto is bfloat16, float32 on cpu",
            "quantization": "of the weights; auto is none here, but what a packed checkpoint has on GPUs and TPUs",
            "max_num_seqs": "requests running at once",
            "max_num_batched_tokens": "token budget of a step",
            "max_model_len": "longest prompt plus completion",
            "speculative_config": "as the server's: what verifying drafts takes, and what a draft model does besides",
        },
    )
    parser.add_argument("--context", type=int, default=1024, help="tokens behind a running request, on average")
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt whose first token is timed")
    parser.add_argument("--every-bucket", action="store_true", help="compile every program, not only the decisive ones")
    parser.add_argument(
        "--full-depth", action="store_true", help="compile all layers instead of extrapolating from a few"
    )
    parser.add_argument("--sweep", action="store_true", help="compare meshes of every topology and recommend one")
    parser.add_argument("--decode-only", action="store_true", help="compile the decode step alone: quick, no TTFT")
    parser.add_argument(
        "--save", default=None, metavar="DIR",
        help="compile every program and keep it in DIR, for serving.launch --compiled DIR",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 when it fits (with --sweep: when anything does), 1 when not, 2 for wrong arguments and
    where the compiler gives up."""
    args = build_parser().parse_args(argv)
    try:
        targets = [chips.parse_target(text) for text in args.topology]
        if args.save is not None and args.sweep:
            raise ValueError("--save keeps the programs of one plan: choose one from --sweep first.")
        if len(targets) > 1 and not args.sweep:
            raise ValueError(f"{len(targets)} topologies were given; comparing them is --sweep.")
        if any(target.platform == "tpu" for target in targets) and not args.in_this_process:
            given = sys.argv[1:] if argv is None else argv
            return guarded([sys.executable, "-m", "serving.plan", *given, "--in-this-process"])
        topology.prepare(targets)
        if args.save is not None:
            _keep_out_of_jax_cache()
        return _sweep(args, targets) if args.sweep else _single(args, targets[0])
    except ValueError as e:
        print(f"serving.plan: {e}", file=sys.stderr)
        return 2


def guarded(command: list[str]) -> int:
    """Runs the command in a process of its own, because the compiler in libtpu ends its process when it fails.

    Returns:
        its exit status.
    Raises:
        ValueError: it was ended by a signal.
    """
    status = subprocess.run(command, check=False).returncode
    if status >= 0:
        return status
    raise ValueError(
        f"the compiler ended by {signal.Signals(-status).name} while it compiled this plan (what it said is above): a defect "
        "of its own, or too little memory here. Try another --mesh, a smaller --max-num-seqs or --max-num-batched-tokens, "
        "--decode-only, or another version of libtpu."
    )


def _keep_out_of_jax_cache() -> None:
    """A CPU program that comes out of JAX's own persistent cache, which the user's environment may name, loads once more but
    cannot be serialized: what is to be kept must be compiled here."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)


def _draft_of(how: Any) -> dict[str, Any] | None:
    """The configuration of a draft model; None of what is looked up, and of heads."""
    return facts.read_config(how.model) if how is not None and how.method == "draft_model" else None


def _quantization(args: argparse.Namespace, target: chips.Target) -> Any:
    """A scheme, or how a packed checkpoint's weights stay on GPUs and TPUs; None for dense ones."""
    if args.quantization != "auto":
        return None if args.quantization == "none" else args.quantization
    if target.platform == "cpu":
        return None
    from serving.plan.packed import packing_of

    return packing_of(facts.read_config(args.model))


def _request(args: argparse.Namespace, target: chips.Target, mesh: str) -> Any:
    from ops.paged_attention import default_page_size
    from serving.plan.planner import Request

    for name in ("context", "prompt"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}.")
    default = "float32" if target.platform == "cpu" else "bfloat16"
    return Request(
        hf=facts.read_config(args.model),
        target=target,
        mesh=mesh,
        dtype=default if args.dtype == "auto" else args.dtype,
        quantization=_quantization(args, target),
        kv_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        page_size=args.page_size or default_page_size(args.kv_cache_dtype, target.platform),
        max_model_len=args.max_model_len,
        context=args.context,
        prompt=args.prompt,
        draft_tokens=0 if args.speculative_config is None else args.speculative_config.draft_tokens,
        draft_hf=_draft_of(args.speculative_config),
        every_bucket=args.every_bucket,
        full_depth=args.full_depth,
        decode_only=args.decode_only,
        adapter_slots=args.max_loras if args.enable_lora else 0,
        max_lora_rank=args.max_lora_rank,
        lora_dtype=args.lora_dtype,
        embeddings_gib=None if args.language_model_only else args.mm_encoder_cache_gb,
    )


def _single(args: argparse.Namespace, target: chips.Target) -> int:
    from serving.plan.planner import make_plan
    from serving.plan.report import to_json, to_text

    if args.save is not None and args.enable_lora:
        raise ValueError("--save keeps no programs for adapters: leave --enable-lora out.")
    plan = make_plan(_request(args, target, args.mesh), _say)
    print(json.dumps(to_json(plan), indent=1) if args.json else to_text(plan))
    if args.save is not None:
        from serving.plan.save import save

        bundle = save(plan, pathlib.Path(args.save), lambda done, of: _say("to keep", done, of))
        print(f"\n{len(bundle.programs)} programs kept: serving.launch --compiled {args.save}", file=sys.stderr)
    return 0 if plan.fits else 1


def _sweep(args: argparse.Namespace, targets: list[chips.Target]) -> int:
    from serving.plan.planner import make_plan
    from serving.plan.programs import config_of
    from serving.plan.report import rank, sweep_text, to_json

    experts = config_of(facts.read_config(args.model)).moe is not None
    plans: list[tuple[Any, str]] = []
    for target in targets:
        meshes = candidate_meshes(target.num_devices, experts) if args.mesh == "auto" else [args.mesh]
        for mesh in meshes:
            try:
                plans.append((make_plan(_request(args, target, mesh), _say), ""))
            except ValueError as e:
                plans.append((None, f"{target.text} {mesh}: {e}"))
    made = sorted((plan for plan, _ in plans if plan is not None), key=rank)
    if args.json:
        print(json.dumps([to_json(plan) for plan in made], indent=1))
    else:
        print(sweep_text(plans))
    return 0 if any(plan.fits for plan in made) else 1


def candidate_meshes(num_devices: int, experts: bool = False) -> list[str]:
    """Splits of the devices into equal halves, quarters, ... of the model axis, the largest first.

    Args:
        experts: also over the expert axis.
    """
    sizes = [size for size in range(num_devices, 0, -1) if num_devices % size == 0 and size & (size - 1) == 0]
    found = [f"model={size}" if size == num_devices else f"data={num_devices // size},model={size}" for size in sizes]
    if experts:
        found += [f"model={size},expert={num_devices // size}" for size in sizes if size < num_devices]
    return found


def _say(program: str, done: int, of: int) -> None:
    if sys.stderr.isatty():
        print(f"\rcompiled {done}/{of}: {program:<40}", end="\n" if done == of else "", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
