"""Adapters of requests that bring something along and name none."""

import types

import pytest

from serving.boot.lora_modules import add_default_loras, default_loras
from serving.engine.api.config import EngineConfig
from serving.llm import LLM
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


def test_the_setting_is_vllms(tmp_path):
    """A text as a flag, or a dict as `LLM` takes it."""
    for given in (f'{{"audio": "{tmp_path}"}}', {"audio": str(tmp_path)}):
        (one,) = default_loras(EngineConfig(enable_lora=True, default_mm_loras=given))
        assert (one.lora_name, one.lora_path) == ("audio", str(tmp_path))
    assert default_loras(EngineConfig()) == ()
    for wrong in ("", "[]", "{}", '{"smell": "."}', '{"audio": 3}', '{"audio": "/nowhere/at all"}'):
        with pytest.raises(ValueError, match="default_mm_loras"):
            default_loras(EngineConfig(enable_lora=True, default_mm_loras=wrong))


def test_whatever_starts_an_engine_tells_before_it_does(tmp_path):
    for wrong in ({}, {"enable_lora": True, "default_mm_loras": {"audio": "/nowhere/at all"}}):
        with pytest.raises(ValueError, match="default_mm_loras"):
            LLM("no model", **{"default_mm_loras": {"audio": str(tmp_path)}} | wrong)


def test_they_are_loaded_and_chosen():
    loaded = []
    adapters = types.SimpleNamespace(load=lambda *one: loaded.append(one), by_sense={})
    add_default_loras(adapters, EngineConfig(enable_lora=True, default_mm_loras={"audio": ".", "image": ".."}))
    assert loaded == [("audio", "."), ("image", "..")] and adapters.by_sense == {"audio": "audio", "image": "image"}
