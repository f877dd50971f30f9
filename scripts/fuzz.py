"""Fuzzes everything that reads what others wrote: protocols, weight files, tokenizers, templates, schemas, grammars.

python scripts/fuzz.py --cases 100000                       all targets, a tenth of the cases each
python scripts/fuzz.py --targets http grpc --seconds 60     as many as fit
python scripts/fuzz.py --targets gguf --seed 7 --only 123   one case again

Exits 1 when a case crashed, hung, said something internal or left something running, or when memory grew.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

MAX_GROWTH_MB = 64.0
"""Allocators and caches of compiled expressions settle within this over 10,000 cases; a leak of 10 KB a case does not."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    from tests.fuzz import packed, parsers, protocols, run

    targets = {**parsers.TARGETS, **packed.TARGETS, **protocols.TARGETS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=sorted(targets), default=sorted(targets))
    parser.add_argument("--cases", type=int, default=100_000, help="over all targets (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="a target's share of time at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", type=int, metavar="CASE", help="run this case of each target alone, failures unhidden"
    )
    args = parser.parse_args(argv)
    failed = False
    print(
        f"{'target':<12} {'cases':>7} {'accepted':>8} {'s':>7} {'ms/case':>8} {'slowest s':>9} {'MB grown':>8}  failures"
    )
    for name in args.targets:
        if args.only is not None:
            _alone(targets[name], args.seed, args.only)
            continue
        result = run.run(name, targets[name], -(-args.cases // len(args.targets)), args.seed, args.seconds)
        each = 1000 * result.seconds / max(1, result.cases)
        print(
            f"{name:<12} {result.cases:>7} {result.accepted:>8} {result.seconds:>7.1f} {each:>8.2f} {result.slowest_s:>9.2f} "
            f"{result.grown_mb:>8.1f}  {len(result.failures)}",
            flush=True,
        )
        for case, what in result.failures[:10]:
            print(f"    case {case}: {what}", flush=True)
        failed |= bool(result.failures) or result.grown_mb > MAX_GROWTH_MB
    return int(failed)


def _alone(make, seed: int, case: int) -> None:
    import random
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for text in make(pathlib.Path(folder))(random.Random(f"{seed}:{case}")):
            print(text)


if __name__ == "__main__":
    sys.exit(main())
