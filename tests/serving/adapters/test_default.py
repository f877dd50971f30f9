"""Adapters of requests that bring something along and name none."""

import argparse
import types

import pytest

from serving.boot.lora_modules import default_loras
from serving.service.adapters import Adapters


class Engine:
    """One with two adapters."""

    def __init__(self) -> None:
        own = {name: types.SimpleNamespace(name=name, tenants=None) for name in ("audio", "image", "mine")}
        self.adapters = types.SimpleNamespace(find=own.get)


def test_what_a_request_brings_chooses_where_it_names_none():
    engine = Engine()
    adapters = Adapters(engine, None, ["base"])
    assert adapters.wanted("base", None, {"sound"}) is None, "nothing is chosen where nothing was asked for"
    adapters.by_sense = {"audio": "audio", "image": "image"}
    assert adapters.wanted("base", None, set()) is None
    assert adapters.wanted("base", None, {"file", "video"}) is None
    assert adapters.wanted("base", None, {"sound"}).name == "audio"
    assert adapters.wanted("base", None, {"sound", "image"}).name == "image"
    assert adapters.wanted("mine", None, {"sound"}).name == "mine"
    engine.adapters = None
    assert adapters.wanted("base", None, {"sound"}) is None


def test_the_flag_is_vllms(tmp_path):
    (one,) = default_loras(f'{{"audio": "{tmp_path}"}}')
    assert (one.lora_name, one.lora_path) == ("audio", str(tmp_path))
    for wrong in ("", "[]", "{}", '{"smell": "."}', '{"audio": 3}', '{"audio": "/nowhere/at all"}'):
        with pytest.raises(argparse.ArgumentTypeError):
            default_loras(wrong)
