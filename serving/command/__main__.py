"""jaxserve WORD ...: everything that there is to run, by one name. Each word imports what it needs, and nothing before that."""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence

MODULES: dict[str, tuple[str, str]] = {
    "serve": ("serving.launch", "serve a model over HTTP and gRPC"),
    "chat": ("serving.chat", "chat with a running server in the terminal"),
    "batch": ("serving.batch", "run a file of requests without a server: -i in.jsonl -o out.jsonl"),
    "gateway": ("serving.gateway", "serve HTTP in front of running servers"),
    "plan": ("serving.plan", "what fits on which devices, and how fast it could be"),
    "models": ("serving.models", "the architectures that can be served"),
    "convert": ("serving.convert", "write a checkpoint as a directory that loads fast"),
    "finetune": ("serving.finetune", "train an adapter"),
    "key": ("serving.access", "make an API key"),
}
"""Word -> the module that does it, and what that is."""

HERE: dict[str, tuple[str, str]] = {
    "run": ("batch_file", "run FILE.jsonl without a server, results beside it"),
    "bench": ("bench", "measure this machine (needs a checkout)"),
    "doctor": ("doctor", "look at this machine and say what to do"),
    "pull": ("cached", "fetch a model into the cache"),
    "list": ("cached", "the models in the caches"),
    "rm": ("cached", "remove a model from the caches"),
    "completion": ("completion", "the shell's completion: bash, zsh or fish"),
}
"""Word -> the file beside this one."""

TRACEBACK_VARIABLE = "JAXSERVE_TRACEBACK"


def usage() -> str:
    """What there is, a line each."""
    lines = ["usage: jaxserve WORD ...", ""]
    for word, (_, text) in sorted({**MODULES, **HERE}.items(), key=lambda one: _ORDER.index(one[0])):
        if is_there(word):
            lines.append(f"  {word:<11} {text}")
    return "\n".join([*lines, "", "jaxserve WORD --help tells more; flags alone are those of `serve`."])


_ORDER = ("serve", "chat", "run", "pull", "list", "rm", "models", "doctor", "bench", "plan", "batch", "convert", "finetune",
          "gateway", "key", "completion")  # fmt: skip


def is_there(word: str) -> bool:
    """Whether this installation has it."""
    return word in HERE or (word in MODULES and importlib.util.find_spec(MODULES[word][0]) is not None)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a word. Returns the exit status; words that are modules end the process as they do under `python -m`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("--version", "version"):
        from serving.installation import version

        print(version())
        return 0
    if argv[0].startswith("-"):
        argv.insert(0, "serve")
    word, rest = argv[0], argv[1:]
    if not is_there(word):
        import difflib

        near = difflib.get_close_matches(word, _ORDER, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"jaxserve: there is no word {word!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return told(lambda: _run(word, rest))


def _run(word: str, rest: list[str]) -> int:
    if word in HERE:
        module = importlib.import_module(f"serving.command.{HERE[word][0]}")
        return module.main(rest, word)
    name = MODULES[word][0]
    sys.argv = [f"jaxserve {word}", *rest]
    runpy.run_module(name, run_name="__main__", alter_sys=True)
    return 0


def told(run: Callable[[], int]) -> int:
    """Runs something, and tells its failures in a sentence: a stack trace only where JAXSERVE_TRACEBACK asks for one."""
    if os.environ.get(TRACEBACK_VARIABLE):
        return run()
    try:
        return run()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ImportError as error:
        print(f"error: {error}. This word needs a package that is not installed.", file=sys.stderr)
    except Exception as error:
        text = str(error) or type(error).__name__
        print(f"error: {text}\n({TRACEBACK_VARIABLE}=1 shows where it came from.)", file=sys.stderr)
    return 1


def cli() -> None:
    """The process."""
    sys.exit(main())


if __name__ == "__main__":
    cli()
