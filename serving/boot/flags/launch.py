"""The server's flags: names, defaults, meanings, and what to say about wrong ones."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from typing import Any, NoReturn

from serving.access.flags import SECRET_FLAGS, access_of, add_access_flags, tls_of
from serving.boot.engine_flags import SETTINGS, add_engine_flags, engine_config, in_flags, shown
from serving.boot.flags import add_models_flags, entries_of, named_model
from serving.boot.lora_modules import check_lora, lora_module
from serving.engine.api.config import EngineConfig
from serving.engine.api.settings import flag_of
from serving.reliability.faults import Fault
from serving.storage.flags import add_store_flags

GRPC_PORT = 50051
HTTP_PORT = 8000

# Flags of vLLM that mean something here under another name.
ELSEWHERE = {
    "--tensor-parallel-size": "say --mesh data=1,model=N",
    "-tp": "say --mesh data=1,model=N",
    "--data-parallel-size": "say --mesh data=N,model=1",
    "-dp": "say --mesh data=N,model=1",
    "--kv-cache-memory-bytes": "it is called --kv-cache-memory here",
    "--block-size": "it is called --page-size here",
    "--api-server-count": "run gateways instead: python -m serving.gateway --target host:port",
    "--shutdown-timeout": "it is called --drain-timeout here",
    "--uvicorn-log-level": "it is called --log-level here",
    "--trust-remote-code": "code of checkpoints is never run here",
}

# Flags of vLLM's command lines that ask for what is so here anyway, or have no meaning: number of values, and why.
HARMLESS = {
    "--enforce-eager": (0, "every step is a compiled program here"),
    "--enable-auto-tool-choice": (0, "tools are always read"),
    "--runner": (1, "the model says what it is for"),
    "--task": (1, "the model says what it is for"),
    "--enable-chunked-prefill": (0, "long prompts are always read in pieces"),
    "--disable-log-requests": (0, "texts of requests are never logged"),
    "--no-enable-log-requests": (0, "texts of requests are never logged"),
    "--disable-log-stats": (0, "numbers are at /metrics"),
    "--load-format": (1, "the files say what they are"),
    "--swap-space": (1, "pages move to the host with --kv-offload-gb"),
    "--distributed-executor-backend": (1, "processes are started one by one here"),
    "--enable-prompt-tokens-details": (0, "they are always told"),
    "--enable-request-id-headers": (0, "they always come back"),
    "--enable-tokenizer-info-endpoint": (0, "it is always there"),
}


class _Taken(argparse.Action):
    """A flag that changes nothing: one line says why."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(f"{option_string} changes nothing here: {HARMLESS[option_string or ''][1]}.", file=sys.stderr)


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
        message = re.sub(r"^argument (--\S+): (?=(?:takes|must) )", r"\1 ", message)
        return message.removeprefix("argument ") + ("" if message.endswith(".") else ".")

    def _unknown(self, word: str) -> str:
        name = word.split("=", 1)[0]
        if name in ELSEWHERE:
            return f"there is no flag {name}: {ELSEWHERE[name]}."
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        near = difflib.get_close_matches(name.replace("_", "-"), flags, n=1, cutoff=0.5)
        return f"there is no flag {name}" + (f"; did you mean {near[0]}?" if near else ".")


def _add_adapter_flags(parser: Parser) -> None:
    """Those of the server, in the engine's group."""
    adapters = next(group for group in parser._action_groups if group.title == "adapters")
    adapters.add_argument(
        "--lora-modules", nargs="+", type=lora_module, default=[], metavar="NAME=PATH",
        help="adapters to serve from the start, each as the model NAME; or JSON with name, path and, where not all may use it, "
        "tenants: the names of the API keys that may",
    )  # fmt: skip
    adapters.add_argument(
        "--lora-folder", default=None, metavar="DIR",
        help="adapters may be loaded from below this folder while the server runs, by admins (default: none may)",
    )  # fmt: skip
    adapters.add_argument(
        "--lora-resolver", nargs="+", default=[], metavar="NAME",
        help="who finds the adapters of models that requests name and nobody has loaded: 'folder' (by their paths below "
        "--lora-folder) or the name of an installed package's (default: they are unknown)",
    )  # fmt: skip


def build_parser() -> Parser:
    """Every flag of `python -m serving.launch`."""
    parser = Parser(
        prog="python -m serving.launch",
        description="Serves a language model over gRPC and the OpenAI API. Without --model: SmolLM2-135M-Instruct.",
        allow_abbrev=False,
        formatter_class=_Help,
    )
    add_engine_flags(parser, repeated=("model",))
    add_models_flags(parser)
    _add_adapter_flags(parser)
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
    add_store_flags(parser)
    for name, (count, _) in HARMLESS.items():
        extra: dict[str, Any] = {"nargs": 0} if not count else {}
        server.add_argument(name, action=_Taken, help=argparse.SUPPRESS, dest=argparse.SUPPRESS, **extra)
    return parser


def check_parsers(args: argparse.Namespace) -> None:
    """Raises ValueError, listing those there are, for a name of no parser: told now, not once the model is loaded."""
    if args.tool_call_parser is None and args.reasoning_parser is None:
        return
    from serving.text.tools import reasoning_family, tool_family

    if args.tool_call_parser is not None:
        tool_family(args.tool_call_parser)
    if args.reasoning_parser is not None:
        reasoning_family(args.reasoning_parser)


def describe(args: argparse.Namespace) -> str:
    """What was given, as one line; secrets are counted, not shown."""
    defaults = vars(build_parser().parse_args([]))
    given = []
    for name, value in sorted(vars(args).items()):
        if name not in defaults or value == defaults[name] or (name == "model" and getattr(args, "entries", ())):
            continue
        flag = flag_name(name)
        if name in SECRET_FLAGS:
            given.append(f"{flag} ({len(value)} hidden)")
        elif isinstance(value, bool):
            given.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            given.append(f"{flag} {shown(name, value)}")
    if len(models := getattr(args, "model_given", [])) > 1:
        given.append(" ".join(f"--model {one}" for one in models))
    return f"given: {', '.join(given)}" if given else "every setting is the default; --help lists them"


def _plain(value: Any) -> str:
    """A default as help shows it."""
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
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


def flag_name(dest: str) -> str:
    """The flag of a parsed value."""
    known = SETTINGS.get(dest)
    return (known and known.flag) or flag_of(dest)


def parse(argv: list[str] | None = None) -> tuple[argparse.Namespace, EngineConfig]:
    """Flags to a configuration; wrong ones end the process with status 2 and a sentence."""
    parser = build_parser()
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    _one_model(args)
    try:
        access = access_of(args)
        tls_of(args)
        for text in args.inject_fault:
            Fault.parse(text)
        check_parsers(args)
        check_lora(args, bool(access.keys))
        config = engine_config(args)
        args.entries = entries_of(args, config)
        if not access.keys and any(
            told.tenants is not None for entry in args.entries for told in (entry, *entry.lora_modules)
        ):
            raise ValueError("models has tenants, and without API keys nobody is told from others: give some.")
        return args, config
    except ValueError as error:
        parser.error(in_flags(str(error), vars(args).keys()))


def _one_model(args: argparse.Namespace) -> None:
    """`args.model` is the one model, as everything but `entries_of` knows it; `args.model_given` all that were named."""
    args.model_given = args.model or []
    args.model = None
    if len(args.model_given) == 1:
        name, args.model = named_model(args.model_given[0])
        if name is not None and args.models is None and not args.served_model_name:
            args.served_model_name = [name]
