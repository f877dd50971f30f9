"""Holds completions to JSON schemas and checks every one: `python scripts/check_schemas.py [--schemas 100] [--each 10]`.

Each of many varied schemas is asked for several times at temperature 1, all at once. A completion that ends by itself must
be valid by `jsonschema`, formats included; one that reaches max_tokens must say `length`. Exit status 1 when one is not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jsonschema

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from serving.boot import startup
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import StructuredOutputs
from serving.engine.api.types import FinishReason
from serving.errors import RequestError
from serving.service import GenerateInput, TextService, collect
from tests.serving.text.schemas import schemas

PROMPT_CHARS = 600
"""Of a schema, at most so many are shown to the model: what holds it is the grammar."""

SHOWN = 20
"""Of wrong completions, at most so many are printed."""


@dataclasses.dataclass
class Tally:
    """What the completions came to. `wrong` has (schema's number, text, why)."""

    valid: int = 0
    cut: int = 0
    tokens: int = 0
    wrong: list[tuple[int, str, str]] = dataclasses.field(default_factory=list)


def problem(schema: Mapping[str, Any], text: str) -> str | None:
    """Why `text` is not a valid instance of `schema`; None where it is."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    try:
        validator.validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return None


async def check(
    service: TextService,
    wanted: Sequence[Mapping[str, Any]],
    *,
    each: int = 10,
    max_tokens: int = 256,
    temperature: float = 1.0,
) -> Tally:
    """Asks for `each` instances of every schema, mixed, with as many at once as the engine runs."""
    tally = Tally()
    gate = asyncio.Semaphore(2 * service.info.max_num_seqs)

    async def one(number: int, seed: int) -> None:
        schema = wanted[number]
        ask = f"Write a JSON value that fits this schema: {json.dumps(schema, ensure_ascii=False)[:PROMPT_CHARS]}"
        given = GenerateInput(messages=[{"role": "user", "content": ask}])
        fields = {
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seed": 1000 * number + seed,
            "structured_outputs": StructuredOutputs(json=schema),
        }
        async with gate:
            try:
                prepared = await service.prepare(given, service.make_params(fields))
                async with contextlib.aclosing(service.generate(prepared)) as stream:
                    choice = (await collect(prepared, stream)).outputs[0]
            except RequestError as error:
                tally.wrong.append((number, "", f"{error.kind.name}: {error.message}"))
                return
        tally.tokens += len(choice.token_ids)
        if choice.finish_reason == FinishReason.LENGTH.value:
            tally.cut += 1
        elif why := problem(schema, choice.text):
            tally.wrong.append((number, choice.text, why))
        else:
            tally.valid += 1

    await asyncio.gather(*(one(number, seed) for seed in range(each) for number in range(len(wanted))))
    return tally


def main() -> int:
    """Prints the tally and each completion that is wrong. Returns 1 when one is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for serving.launch (default: the default model)")
    parser.add_argument("--schemas", type=int, default=100, help="schemas (default: %(default)s)")
    parser.add_argument("--each", type=int, default=10, help="completions of each (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one completion (default: %(default)s)")
    parser.add_argument("--max-model-len", type=int, default=1024)
    args = parser.parse_args()
    config = EngineConfig(model=args.model, max_model_len=args.max_model_len, progress=False)
    started = startup.start(config, say=lambda line: print(line, file=sys.stderr))
    try:
        began = time.monotonic()

        async def run() -> Tally:
            wanted = schemas(args.schemas)
            return await check(started.service(), wanted, each=args.each, max_tokens=args.max_tokens)

        tally = asyncio.run(run())
        seconds = time.monotonic() - began
    finally:
        started.engine.shutdown()
    total = tally.valid + tally.cut + len(tally.wrong)
    print(
        f"{total} completions of {args.schemas} schemas: {tally.valid} valid, {tally.cut} cut by max_tokens, "
        f"{len(tally.wrong)} wrong; {tally.tokens} tokens in {seconds:.0f} s"
    )
    for number, text, why in sorted(tally.wrong)[:SHOWN]:
        print(f"  schema {number}: {why}: {text!r}")
    return int(bool(tally.wrong))


if __name__ == "__main__":
    sys.exit(main())
