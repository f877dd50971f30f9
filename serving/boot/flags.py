"""The server's flags: names, defaults, meanings, and what to say about wrong ones."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from serving.access.flags import SECRET_FLAGS, access_of, add_access_flags, tls_of
from serving.engine.api.config import DTYPES, KV_CACHE_DTYPES, POLICIES, QUANTIZATIONS, EngineConfig
from serving.reliability.faults import Fault

GRPC_PORT = 50051
HTTP_PORT = 8000

# Flags of vLLM that mean something here under another name.
ELSEWHERE = {
    "--tensor-parallel-size": "say --mesh data=1,model=N",
    "-tp": "say --mesh data=1,model=N",
    "--data-parallel-size": "say --mesh data=N,model=1",
    "-dp": "say --mesh data=N,model=1",
    "--gpu-memory-utilization": "give the KV cache's size itself: --kv-cache-memory 4GiB",
    "--kv-cache-memory-bytes": "it is called --kv-cache-memory here",
    "--block-size": "it is called --page-size here",
    "--api-server-count": "run gateways instead: python -m serving.gateway --target host:port",
    "--shutdown-timeout": "it is called --drain-timeout here",
    "--uvicorn-log-level": "it is called --log-level here",
    "--enforce-eager": "every step is a compiled program here; there is no eager mode",
    "--trust-remote-code": "code of checkpoints is never run here",
}


class Parser(argparse.ArgumentParser):
    """Explains wrong flags instead of printing every right one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {self._explain(message)}\nAll flags: {self.prog} --help\n")

    def _explain(self, message: str) -> str:
        unknown = re.match(r"unrecognized arguments: (.*)", message)
        if unknown:
            return " ".join(self._unknown(word) for word in unknown[1].split() if word.startswith("-")) or (
                f"{unknown[1]!r} belongs to no flag."
            )
        wrong = re.match(r"argument (\S+): invalid (\S+) value: (.*)", message)
        if wrong:
            kind = {"int": "a whole number", "float": "a number"}.get(wrong[2], wrong[2])
            return f"{wrong[1]} takes {kind}, got {wrong[3]}."
        return message.removeprefix("argument ") + ("" if message.endswith(".") else ".")

    def _unknown(self, word: str) -> str:
        name = word.split("=", 1)[0]
        if name in ELSEWHERE:
            return f"there is no flag {name}: {ELSEWHERE[name]}."
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        near = difflib.get_close_matches(name.replace("_", "-"), flags, n=1, cutoff=0.5)
        return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else ".")


def build_parser() -> Parser:
    """Every flag of `python -m serving.launch`."""
    parser = Parser(
        prog="python -m serving.launch",
        description="Serves a language model over gRPC and the OpenAI API. Without --model: SmolLM2-135M-Instruct.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    add_engine_flags(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    server.add_argument("--grpc-port", type=_port, default=GRPC_PORT, help="gRPC port; 0 takes a free one")
    server.add_argument(
        "--port", type=_port, default=None, metavar="PORT",
        help=f"HTTP port (OpenAI API, metrics, playground); 0 takes a free one (default: {HTTP_PORT}, "
        "and no HTTP when that is taken)",
    )  # fmt: skip
    server.add_argument("--no-http", action="store_true", help="serve gRPC alone")
    server.add_argument(
        "--allowed-origins", nargs="+", default=[], metavar="ORIGIN", help="browser origins that may call the HTTP API"
    )
    server.add_argument(
        "--served-model-name", nargs="+", default=[], metavar="NAME",
        help="names of the model; answers carry the first. Its own name and 'default' always work "
        "(default: its own name)",
    )  # fmt: skip
    server.add_argument(
        "--drain-timeout", type=_seconds, default=30.0, metavar="S",
        help="after SIGTERM, seconds that running requests get to finish; a second signal stops at once",
    )  # fmt: skip
    server.add_argument(
        "--otlp-traces-endpoint", default=None, metavar="URL",
        help="OpenTelemetry collector that gets a span of each completion, such as http://localhost:4317; "
        "needs the extra otel (default: none)",
    )  # fmt: skip
    server.add_argument("--log-format", choices=("human", "json"), default="human", help="how log lines look")
    server.add_argument(
        "--tool-call-parser", default=None, metavar="NAME",
        help="how the model writes tool calls, by vLLM's names (default: what its chat template shows)",
    )  # fmt: skip
    server.add_argument(
        "--reasoning-parser", default=None, metavar="NAME",
        help="how the model marks its thinking, by vLLM's names (default: what its chat template shows)",
    )  # fmt: skip
    server.add_argument(
        "--supervise", action="store_true", help="keep a second process that starts the server again when it dies"
    )
    server.add_argument(
        "--watchdog-timeout", type=_seconds, default=300.0, metavar="S",
        help="a step that takes longer means that the device or the engine is stuck: clients are told, a crash report is "
        "written, the process ends; 0 for never",
    )  # fmt: skip
    server.add_argument(
        "--crash-dir", default=None, metavar="DIR", help="where crash reports go (default: the user's state folder)"
    )
    server.add_argument("--inject-fault", nargs="+", default=[], metavar="FAULT", help=argparse.SUPPRESS)
    server.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info", help="log level")
    add_access_flags(parser)
    return parser


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is served, and how."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", default=None,
        help="GGUF file, Hugging Face or Orbax directory, or hub id (default: SmolLM2-135M-Instruct, fetched once)",
    )  # fmt: skip
    model.add_argument(
        "--tokenizer", default=None, metavar="MODEL", help="take the tokenizer from here (default: --model)"
    )
    model.add_argument(
        "--chat-template", default=None, metavar="FILE", help="Jinja file or text (default: the model's own)"
    )
    model.add_argument(
        "--generation-config", choices=("auto", "vllm"), default="auto",
        help="sampling defaults of requests that leave them open: auto takes the checkpoint's, vllm the API's",
    )  # fmt: skip
    model.add_argument(
        "--dtype", choices=DTYPES, default="auto",
        help="what to compute in; auto is float32 on CPU and bfloat16 elsewhere",
    )  # fmt: skip
    model.add_argument(
        "--quantization", choices=QUANTIZATIONS, default="auto",
        help="of the weights; auto is int8 on a CPU with native kernels (when --dtype is auto too) and none elsewhere",
    )  # fmt: skip
    model.add_argument(
        "--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="of the KV cache; auto follows the others"
    )
    model.add_argument("--seed", type=int, default=0, help="base of the seeds of requests that bring none")

    engine = parser.add_argument_group("engine")
    engine.add_argument(
        "--max-model-len", type=_count, default=None, metavar="N",
        help="longest prompt plus completion, in tokens (default: the model's own, cut to what the KV cache holds)",
    )  # fmt: skip
    engine.add_argument(
        "--max-num-seqs", type=_count, default=None, metavar="N",
        help="requests running at once (default: 64 on CPU, 256 elsewhere)",
    )  # fmt: skip
    engine.add_argument(
        "--max-num-batched-tokens", type=_count, default=None, metavar="N",
        help="tokens of one step, prompts and completions together (default: 1024 on CPU, 4096 elsewhere)",
    )  # fmt: skip
    engine.add_argument("--page-size", type=_count, default=16, metavar="N", help="token positions of a KV page")
    engine.add_argument(
        "--kv-cache-memory", type=_size, default=None, metavar="SIZE",
        help="memory for the KV cache over all devices, such as 4GiB or 500MB (default: from the free memory)",
    )  # fmt: skip
    engine.add_argument(
        "--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True,
        help="share pages of equal prompt beginnings",
    )  # fmt: skip
    engine.add_argument("--scheduling-policy", choices=POLICIES, default="fcfs", help="order of waiting requests")
    engine.add_argument(
        "--num-scheduler-steps", type=_count, default=1, metavar="N",
        help="decode steps in one dispatch while nothing waits: less host work, coarser streaming",
    )  # fmt: skip
    engine.add_argument(
        "--prefix-first", action=argparse.BooleanOptionalAction, default=False,
        help="among waiting requests of equal priority, those with the longest cached prefix first",
    )  # fmt: skip
    engine.add_argument(
        "--fair-share", action=argparse.BooleanOptionalAction, default=False,
        help="serve the least-served tenant (API key or metadata) first, within equal priority",
    )  # fmt: skip
    engine.add_argument(
        "--kv-offload-gb", type=_seconds, default=0.0, metavar="GIB",
        help="host memory for pages evicted from the device, which come back on a hit",
    )  # fmt: skip
    engine.add_argument(
        "--max-waiting-time", type=_seconds, default=None, metavar="S",
        help="seconds a request may wait for its first step (default: no bound)",
    )  # fmt: skip
    engine.add_argument(
        "--max-running-time", type=_seconds, default=None, metavar="S",
        help="seconds a request may run after its first step (default: no bound)",
    )  # fmt: skip
    engine.add_argument(
        "--max-num-queued-reqs", type=_count, default=None, metavar="N",
        help="requests that may wait; more are refused with RESOURCE_EXHAUSTED (default: no bound)",
    )  # fmt: skip
    engine.add_argument(
        "--max-num-queued-tokens", type=_count, default=None, metavar="N",
        help="prompt tokens that may wait (default: no bound)",
    )  # fmt: skip
    engine.add_argument(
        "--async-scheduling", action=argparse.BooleanOptionalAction, default=True,
        help="prepare a step while the one before it runs",
    )  # fmt: skip
    engine.add_argument(
        "--compile-cache", default=None, metavar="DIR",
        help='folder of compiled programs; "" for none (default: the user\'s cache folder)',
    )  # fmt: skip
    engine.add_argument(
        "--compiled", default=None, metavar="DIR",
        help="run the programs that python -m serving.plan --save compiled, and compile nothing",
    )  # fmt: skip
    engine.add_argument(
        "--attention-backend", default=None, metavar="NAME",
        help="force one implementation of paged attention (default: the first that fits)",
    )  # fmt: skip
    engine.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=True, help="show progress bars at start"
    )

    devices = parser.add_argument_group("devices")
    devices.add_argument(
        "--mesh",
        default="data=1,model=1",
        metavar="AXES",
        help="axes of the device mesh and their sizes: data "
        "(replicas with pages and requests of their own), model (tensor parallel), expert",
    )
    devices.add_argument(
        "--cpu-devices",
        type=_count,
        default=None,
        metavar="N",
        help="split the CPU into this many devices (default: 1); of each process, where there are several",
    )
    devices.add_argument(
        "--coordinator", default=None, metavar="HOST:PORT",
        help="run as one of several processes that share the mesh: an address on which process 0 listens for the others, "
        "or auto to ask Cloud TPU, LeaderWorkerSet, Kubernetes, Slurm or Open MPI (default: a single process)",
    )  # fmt: skip
    devices.add_argument(
        "--num-processes", type=_count, default=None, metavar="N", help="how many processes there are (default: found)"
    )
    devices.add_argument(
        "--process-id", type=_index, default=None, metavar="I",
        help="which one this is: 0 schedules and serves, the others only compute (default: found)",
    )  # fmt: skip
    devices.add_argument(
        "--step-timeout", type=_seconds, default=10.0, metavar="S",
        help="with several processes, seconds that a step may take before the engine counts as stuck and ends",
    )  # fmt: skip


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's part of parsed flags. The names of the model belong to the service.

    Raises:
        ValueError: values that contradict each other or are out of range, in a sentence.
    """
    names = {name for name in EngineConfig.__dataclass_fields__ if hasattr(args, name)} - {"served_model_name"}
    return EngineConfig(**{name: getattr(args, name) for name in names}, policy=args.scheduling_policy)


def check_parsers(args: argparse.Namespace) -> None:
    """Raises ValueError, listing those there are, for a name of no parser: told now, not once the model is loaded."""
    if args.tool_call_parser is None and args.reasoning_parser is None:
        return
    from serving.text.tools import reasoning_family, tool_family

    if args.tool_call_parser is not None:
        tool_family(args.tool_call_parser)
    if args.reasoning_parser is not None:
        reasoning_family(args.reasoning_parser)


def describe(args: argparse.Namespace) -> list[str]:
    """The flags in effect, as lines: those that were given are marked."""
    defaults = vars(build_parser().parse_args([]))
    width = max(map(len, defaults)) + 2
    lines = []
    for name in sorted(vars(args)):
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        mark = "" if value == defaults.get(name) else "  (given)"
        shown = f"({len(value)} hidden)" if name in SECRET_FLAGS and value else _plain(value)
        lines.append(f"{flag:<{width}} {shown}{mark}")
    return lines


def _plain(value: Any) -> str:
    if value is None:
        return "auto"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)


class _Help(argparse.HelpFormatter):
    """Every flag with its default, once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if (
            action.option_strings
            and action.dest != "help"
            and text is not argparse.SUPPRESS
            and "(default:" not in text
        ):
            text += f" (default: {_plain(action.default)})"
        return text.replace("%", "%%")


def _port(text: str) -> int:
    return _within(text, 0, 65535, "a port from 0 to 65535")


def _index(text: str) -> int:
    return _within(text, 0, 2**31, "a whole number of at least 0")


def _count(text: str) -> int:
    return _within(text, 1, 2**62, "a whole number of at least 1")


def _within(text: str, low: int, high: int, what: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise argparse.ArgumentTypeError(f"takes {what}, got {text!r}.")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"takes seconds, at least 0, got {text!r}.")
    return value


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _size(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None or float(match[1]) * unit < 1:
        raise argparse.ArgumentTypeError(f"takes a size such as 4GiB, 500MB or a number of bytes, got {text!r}.")
    return int(float(match[1]) * unit)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, EngineConfig]:
    """Flags to a configuration; wrong ones end the process with status 2 and a sentence."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        access_of(args)
        tls_of(args)
        for text in args.inject_fault:
            Fault.parse(text)
        check_parsers(args)
        return args, engine_config(args)
    except ValueError as error:
        parser.error(re.sub(r"^([a-z]+(?:_[a-z]+)*) ", lambda m: "--" + m[1].replace("_", "-") + " ", str(error)))
