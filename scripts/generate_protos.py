"""Regenerates the Python stubs under proto/ from the .proto files. Needs grpcio-tools (dependency group `test`).

python scripts/generate_protos.py            writes them
python scripts/generate_protos.py --check    exits 1 when the committed ones are not what would be written
"""

from __future__ import annotations

import argparse
import importlib.resources
import pathlib
import re
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent / "proto"
PACKAGE = pathlib.PurePath("jaxserve/v1")
PATTERNS = ("*_pb2.py", "*_pb2.pyi", "*_pb2_grpc.py")


def generate(out: pathlib.Path) -> dict[str, str]:
    """Runs protoc into `out`.

    Returns:
        file name -> text, with imports of our own stubs made absolute below `proto`: the .proto files are rooted at
        proto/ (as buf and reflection clients expect), the Python package at its parent.
    """
    from grpc_tools import protoc

    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / PACKAGE).glob("*.proto"))
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    args = ["protoc", f"-I{ROOT}", f"-I{well_known}"]
    args += [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    if protoc.main(args + files):
        raise SystemExit("protoc failed.")
    made = {}
    for pattern in PATTERNS:
        for path in (out / PACKAGE).glob(pattern):
            text = re.sub(r"^from jaxserve\.v1 import", "from proto.jaxserve.v1 import", path.read_text(), flags=re.M)
            if not _only_boilerplate(path.name, text):
                made[path.name] = text
    return made


def _only_boilerplate(name: str, text: str) -> bool:
    """protoc writes an empty gRPC file for a .proto without a service."""
    return name.endswith("_grpc.py") and "class " not in text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    args = parser.parse_args()
    folder = ROOT / PACKAGE
    committed = {p.name: p.read_text() for pattern in PATTERNS for p in folder.glob(pattern)}
    with tempfile.TemporaryDirectory() as scratch:
        made = generate(pathlib.Path(scratch))
    if args.check:
        stale = sorted(n for n in made.keys() | committed.keys() if made.get(n) != committed.get(n))
        if stale:
            print(f"Not up to date: {', '.join(stale)}. Run python scripts/generate_protos.py.", file=sys.stderr)
        return 1 if stale else 0
    for name in committed.keys() - made.keys():
        (folder / name).unlink()
    for name, text in made.items():
        (folder / name).write_text(text)
    print(f"Wrote {len(made)} files to {folder}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
