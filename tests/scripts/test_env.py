"""scripts/env.sh: where the tests' torch is looked for."""

from __future__ import annotations

import pathlib
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
        python.write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/told\ncase "$*" in {answers} esac\n')
        python.chmod(0o755)
        (tmp_path / "told").write_text("")
        (tmp_path / "wanted").write_text(requirements)
        code = f"source {SCRIPT}; VENV={tmp_path}; TORCH_INDEX={index}; install_torch {tmp_path}/wanted"
        subprocess.run(["bash", "-euc", code], check=True, capture_output=True)
        return [line for line in (tmp_path / "told").read_text().splitlines() if not line.startswith("-c")]

    return asked


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the package index has no CUDA either")
def test_torch_comes_from_its_own_index_where_that_answers(asked):
    looked, installed = asked()
    assert looked == f"{PIP} index versions torch --index-url https://torch.example/cpu --retries 0 --timeout 10"
    assert installed == f"{PIP} install -q --index-url https://torch.example/cpu torch==9.9"
    assert len(asked(reachable=False)) == 1, "the rest is as without this index"


def test_nobody_is_asked_where_there_is_nothing_to_have(asked):
    assert not asked(installed=True) and not asked(index="none") and not asked(requirements="pytest>=8\n")
