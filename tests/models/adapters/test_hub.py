"""Adapters by hub ids, from a hub on this machine: which of a repository's files are fetched, what is said where there is none."""

from __future__ import annotations

import pytest

from models.adapters.read import locate
from tests.models.adapters.make import write_adapter
from tests.models.loading.test_hub import fake

__all__ = ["fake"]


def test_only_the_adapters_files_are_fetched(fake, tmp_path):
    made = write_adapter(tmp_path / "made")
    wanted = {file.name: file.read_bytes() for file in made.iterdir()} | {"chat_template.jinja": b"{{ messages }}"}
    others = (
        "README.md",
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-9/adapter_model.safetensors",
        "adapter_model.bin",
    )
    fake.repos["o/lora"] = wanted | dict.fromkeys(others, b"x")
    found = locate("o/lora")
    assert {file.name: file.read_bytes() for file in found.iterdir()} == wanted
    assert set(fake.fetched) == set(wanted)
    fake.fetched.clear()
    assert locate("o/lora") == found and fake.fetched == []


def test_a_gguf_of_several(fake):
    fake.repos["o/ggufs"] = {"a-lora-f16.gguf": b"GGUF first", "b-lora-q8_0.gguf": b"GGUF second"}
    assert locate("o/ggufs:b-lora-q8_0.gguf").read_bytes() == b"GGUF second"
    assert fake.fetched == ["b-lora-q8_0.gguf"]
    with pytest.raises(ValueError, match="o/ggufs:f16"):
        locate("o/ggufs")


def test_where_there_is_none(fake, tmp_path):
    with pytest.raises(ValueError, match="o/nothing"):
        locate("o/nothing")
    assert locate(str(tmp_path / "nowhere")) == tmp_path / "nowhere", (
        "a path is taken as it is; reading it says what is wrong"
    )
