"""Fetches axe-core, whose rules the page's test goes by: `python scripts/fetch_axe.py`.

https://github.com/dequelabs/axe-core, from npm, pinned by checksum, into the user's cache. Not in the repository: it is large, and
has a licence of its own (MPL-2.0).
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
import urllib.request
from pathlib import Path

import platformdirs

VERSION = "4.11.1"
SHA256 = "5b86f813d96904f2d925fed5715877c75fc1cc140f89565fb42145e7801b2305"


def axe_file() -> Path:
    """Where it is, or would be."""
    base = os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve")
    return Path(base) / "axe-core" / VERSION / "axe.min.js"


def main() -> None:
    file = axe_file()
    if not file.exists():
        registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
        url = f"{registry}/axe-core/-/axe-core-{VERSION}.tgz"
        with urllib.request.urlopen(url, timeout=60) as reply:
            data = reply.read()
        if hashlib.sha256(data).hexdigest() != SHA256:
            raise SystemExit(f"{url} does not have the expected checksum.")
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            member = archive.extractfile("package/axe.min.js")
            if member is None:
                raise SystemExit(f"{url} has no axe.min.js.")
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_bytes(member.read())
            partial.replace(file)
    print(file)


if __name__ == "__main__":
    main()
