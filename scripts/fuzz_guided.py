"""Fuzzes a parser by the branches that its cases take: atheris (libFuzzer) over our Python code.

    pip install --group fuzz
    python scripts/fuzz_guided.py gguf --seconds 60
    python scripts/fuzz_guided.py reply --corpus DIR        keeps what it found for the next run

Prints libFuzzer's report. A case that raises, hangs for 10 s or takes 2 GiB ends the run with a status that is not 0 and is
written to the folder as crash-*; `python scripts/fuzz_guided.py TARGET CRASH_FILE` runs it alone.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    from tests.fuzz import guided

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=sorted(guided.TARGETS))
    parser.add_argument("case", nargs="?", type=pathlib.Path, help="a crash file to run alone")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=pathlib.Path, help="where interesting cases are kept (default: nowhere)")
    args = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed: `pip install --group fuzz` (Linux and macOS).")
    with atheris.instrument_imports(include=["models.loading", "serving.text"]):
        folder = pathlib.Path(tempfile.mkdtemp(prefix="jaxserve-fuzz-"))
        one = guided.TARGETS[args.target](folder)
    if args.case is not None:
        one(args.case.read_bytes())
        return
    corpus = args.corpus or folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(guided.seeds(args.target, folder)):
        (corpus / f"seed-{i}").write_bytes(seed)
    flags = [f"-max_total_time={args.seconds}", "-timeout=10", "-rss_limit_mb=2048", f"-artifact_prefix={corpus}/"]
    atheris.Setup([sys.argv[0], str(corpus), *flags, "-max_len=4096", "-print_final_stats=1"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
