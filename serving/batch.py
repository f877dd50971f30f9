"""python -m serving.batch -i in.jsonl -o out.jsonl: OpenAI batch files, without a server.

A line of the input names a request: {"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}.
Each becomes a line of the output, in order of completion. Killed and started again, it goes on where it was.
https://platform.openai.com/docs/guides/batch
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from serving import event_loop
from serving.engine.api.config import EngineConfig
from serving.errors import RequestError
from serving.frontends.openai.batches.runner import Summary, finished_keys, run_batch


def _count_lines(path: pathlib.Path) -> int:
    try:
        with path.open("rb") as file:
            return sum(1 for raw in file if raw.strip())
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror}).") from None


def _check_writable(path: pathlib.Path) -> None:
    """Raises ValueError for an output that cannot be written; leaves no trace."""
    fresh = not path.exists()
    try:
        path.open("ab").close()
    except OSError as error:
        raise ValueError(f"--output {path}: cannot be written ({error.strerror}).") from None
    if fresh:
        path.unlink()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a batch file. Returns 0 when every line succeeded, 1 when some failed, 2 for wrong flags or files."""
    from serving.boot.engine_flags import add_engine_flags, engine_config, in_flags
    from serving.boot.flags.launch import Parser

    parser = Parser(prog="python -m serving.batch", description=__doc__, allow_abbrev=False)
    parser.add_argument("-i", "--input", required=True, type=pathlib.Path, help="batch file, one JSON object a line")
    parser.add_argument("-o", "--output", required=True, type=pathlib.Path, help="results; gone on with when there")
    parser.add_argument("--concurrency", type=int, default=None, help="requests at once (default: twice what runs)")
    add_engine_flags(parser)
    args = parser.parse_args(argv)
    try:
        config = engine_config(args)
        total = _count_lines(args.input)
        finished_keys(args.output)  # a wrong file is told before the model is loaded
        _check_writable(args.output)
    except (OSError, ValueError) as error:
        parser.error(in_flags(str(error), vars(args).keys()))
    from serving.boot.startup import start

    try:
        started = start(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    except (OSError, ValueError) as error:
        print(f"error: {in_flags(str(error), vars(args).keys())}", file=sys.stderr)
        return 2
    try:
        summary = event_loop.run(_run(started, args, config, total))
    except (ValueError, RequestError) as error:  # an adapter cannot be served
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; start it again to go on", file=sys.stderr)
        return 130
    finally:
        started.engine.shutdown()
    again = f", {summary.skipped} were there already" if summary.skipped else ""
    print(f"{summary.succeeded} succeeded, {len(summary.failures)} failed{again}: {args.output}", file=sys.stderr)
    for number, custom_id, why in summary.failures:
        print(f"  line {number} ({custom_id}): {why}", file=sys.stderr)
    return 1 if summary.failures else 0


async def _run(started: Any, args: Any, config: EngineConfig, total: int) -> Summary:
    from tqdm import tqdm

    from serving.boot.lora_modules import add_default_loras
    from serving.frontends.app import create_app

    service = started.service()
    add_default_loras(service.adapters, config)
    concurrency = args.concurrency or 2 * service.info.max_num_seqs
    with contextlib.closing(tqdm(total=total, unit="req", disable=not args.progress)) as bar:

        def progress(summary: Summary) -> None:
            bar.update(summary.total - bar.n)
            bar.set_postfix(failed=len(summary.failures), refresh=False)

        return await run_batch(
            create_app(service, page=False), args.input, args.output, concurrency=concurrency, on_done=progress
        )


if __name__ == "__main__":
    sys.exit(main())
