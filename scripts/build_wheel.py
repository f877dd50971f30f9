"""Builds a wheel for this platform, with the native library inside: python scripts/build_wheel.py [DIR] (default: dist).

Installed, it needs no compiler. The sources are copied first: nothing is left in the checkout but the wheel. `--check` installs
it into a bare virtual environment, asks it for its version and its doctor's word, and has it serve: it says how long the
installation took, and how long `jaxserve serve` did to its first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

REPO = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("serving", "models", "ops", "sharding", "proto")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.pyc", "libjaxserve-*")


def build_wheel(target: pathlib.Path) -> pathlib.Path:
    """Builds it into a folder.

    Returns:
        the wheel.
    Raises:
        subprocess.CalledProcessError: a step failed; what it printed says why.
    """
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "jaxserve"
        for name in FOLDERS:
            shutil.copytree(REPO / name, copy / name, ignore=LEFT_OUT)
        for name in FILES:
            shutil.copy(REPO / name, copy / name)
        # The one in the user's cache, where this machine has built it before: minutes otherwise.
        library = "import shutil; from ops.native import build; shutil.copy(build.build(), build.SOURCES / build._carried_name())"
        environment = {**os.environ, "PYTHONPATH": str(copy), "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-c", library], check=True, cwd=copy, env=environment)
        wheels = pathlib.Path(folder) / "wheels"
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(wheels), str(copy)]
        subprocess.run(command, check=True)
        (wheel,) = wheels.glob("*.whl")
        return pathlib.Path(shutil.copy(wheel, target / wheel.name))


def check_wheel(wheel: pathlib.Path) -> None:
    """Installs it where nothing else is, and runs it.

    Raises:
        subprocess.CalledProcessError: it does not install or run.
    """
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        bin_folder = pathlib.Path(folder) / "bin"
        began = time.monotonic()
        subprocess.run([str(bin_folder / "python"), "-m", "pip", "install", "--quiet", str(wheel)], check=True)
        print(f"installed after {time.monotonic() - began:.1f} s", flush=True)
        for words in (["--version"], ["doctor"], ["serve", "--help"]):
            subprocess.run([str(bin_folder / "jaxserve"), *words], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        answer, seconds = first_answer(bin_folder / "jaxserve", pathlib.Path(folder))
        print(f"first answer {seconds:.1f} s after `jaxserve serve`: {answer!r}", flush=True)


def first_answer(command: pathlib.Path, folder: pathlib.Path) -> tuple[str, float]:
    """Starts the installed server on the default model, from a folder that holds none of our sources.

    Returns:
        what it answers to a question, and seconds from the start of the process to the answer.
    Raises:
        subprocess.CalledProcessError: it did not start.
    """
    words = [str(command), "serve", "--port", "0", "--grpc-port", "0", "--no-progress"]
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    began = time.monotonic()
    with subprocess.Popen(words, cwd=folder, env=outside, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            told = []
            for line in process.stderr:
                told.append(line)
                if "clients of OpenAI's API use" in line:
                    break
            else:
                raise subprocess.CalledProcessError(process.wait(), words, stderr="".join(told))
            body = {
                "messages": [{"role": "user", "content": "What is the capital of France?"}],
                "temperature": 0,
                "max_tokens": 16,
            }
            request = urllib.request.Request(
                f"{told[-1].split()[-1]}/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer = json.load(reply)["choices"][0]["message"]["content"]
            return answer, time.monotonic() - began
        finally:
            process.terminate()


def main() -> int:
    """Prints the wheel's path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", nargs="?", type=pathlib.Path, default=REPO / "dist")
    parser.add_argument(
        "--check", action="store_true", help="install it into a bare virtual environment, and run it there"
    )
    args = parser.parse_args()
    try:
        wheel = build_wheel(args.target)
        if args.check:
            check_wheel(wheel)
    except subprocess.CalledProcessError as error:
        print(f"error: {' '.join(map(str, error.cmd[:4]))} ... ended with {error.returncode}", file=sys.stderr)
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())
