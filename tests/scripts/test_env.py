"""scripts/env.sh: where the tests' torch is looked for, and where files are kept."""

from __future__ import annotations

import os
import pathlib
import shlex
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "scripts" / "env.sh"
PIP = "-m pip --disable-pip-version-check"


@pytest.fixture
def asked(tmp_path):
    """What `install_torch` has the environment's Python do."""

    def asked(
        installed=False, reachable=True, index="https://torch.example/cpu", requirements="torch==9.9\ntorchvision>=1\n"
    ):
        python = tmp_path / "bin" / "python"
        python.parent.mkdir(exist_ok=True)
        answers = f"*' index '*) exit {0 if reachable else 1};; -c*) exit {0 if installed else 1};;"
        told = shlex.quote(f"{tmp_path}/told")
        python.write_text(f'#!/bin/sh\necho "$*" >> {told}\ncase "$*" in {answers} esac\n')
        python.chmod(0o755)
        (tmp_path / "told").write_text("")
        (tmp_path / "wanted").write_text(requirements)
        folder, script = shlex.quote(str(tmp_path)), shlex.quote(str(SCRIPT))
        code = f"source {script}; VENV={folder}; TORCH_INDEX={index}; install_torch {folder}/wanted"
        subprocess.run(["bash", "-euc", code], check=True, capture_output=True)
        return [line for line in (tmp_path / "told").read_text().splitlines() if not line.startswith(("-c", "- "))]

    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the package index has no CUDA either")
def test_torch_comes_from_its_own_index_where_that_answers(asked):
    looked, installed = asked()
    assert looked == f"{PIP} index versions torch --index-url https://torch.example/cpu --retries 0 --timeout 10"
    assert installed == f"{PIP} install -q --index-url https://torch.example/cpu torch==9.9"
    assert len(asked(reachable=False)) == 1, "the rest is as without this index"


def test_nobody_is_asked_where_there_is_nothing_to_have(asked):
    assert not asked(installed=True) and not asked(index="none") and not asked(requirements="pytest>=8\n")


@pytest.mark.parametrize(
    ("named", "found"), [({}, "~/.cache"), ({"XDG_CACHE_HOME": "/c"}, "/c"), ({"HOME": "/h"}, "/h/.cache")]
)
def test_files_are_kept_where_the_user_has_them_whether_or_not_home_is_set(named, found):
    outside = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    code = f"source {shlex.quote(str(SCRIPT))}; echo $USER_CACHE; echo ~"
    done = subprocess.run(["bash", "-euc", code], check=True, capture_output=True, text=True, env={**outside, **named})
    kept, home = done.stdout.splitlines()
    assert kept == found.replace("~", home)
