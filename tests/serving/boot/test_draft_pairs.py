"""Drafts meet everything else: of each pair either a test holds it to the tokens without drafts, or a start refuses it."""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import pathlib
from typing import Any

import pytest

from serving.boot import check, load, startup
from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = pathlib.Path(__file__).parents[3]

LOOKUPS, MODEL, HEADS = "lookups", "draft_model", "heads"
REFUSED = "refused: "
"""What begins so is the name of a case of REFUSALS; the rest are tests."""

ENGINE = "tests/serving/engine/"
OPTIONS = {
    LOOKUPS: ENGINE + "test_drafts.py::test_a_method_changes_no_token",
    MODEL: ENGINE + "test_draft_model.py::test_a_draft_model_changes_no_token",
    HEADS: ENGINE + "test_lossless.py::test_lossless",
}
"""Requests with every option, real grammars and tool calls among them."""
GRAMMARS = ENGINE + "test_lossless_grammars.py::test_lossless_under_grammars"
ORACLE = ENGINE + "test_drafts.py::test_right_and_wrong_drafts_change_no_token"
LOSSLESS = ENGINE + "test_lossless.py::test_lossless"
MESHES = ENGINE + "test_lossless.py::test_on_meshes"
BOOT = "tests/serving/boot/test_draft.py::"

REPLICAS = ENGINE + "test_mesh.py::test_drafts_are_verified_in_every_replica_of_a_cut_model"
TRAVEL = "tests/serving/transfer/test_drafts.py::test_pages_of_a_draft_travel"
FLEET = "tests/serving/fleet/test_switching.py::test_mixed_load_is_answered_right_and_nothing_compiles_or_stays_behind"
TRACED = "tests/models/bridge/test_engine.py::test_shared_prefixes_preemption_and_drafts_change_no_token"

PAIRS: dict[str, dict[str, str]] = {
    "sampling, penalties, bias, min_tokens, stop tokens": OPTIONS,
    "log probabilities": OPTIONS,
    "stop strings, n": dict.fromkeys((LOOKUPS, MODEL, HEADS), LOSSLESS),
    "grammars": {**OPTIONS, LOOKUPS: GRAMMARS, MODEL: GRAMMARS},
    "tools": {**OPTIONS, LOOKUPS: GRAMMARS, MODEL: GRAMMARS},
    "allowed_token_ids, bad_words": dict.fromkeys((LOOKUPS, MODEL, HEADS), LOSSLESS),
    "prefix sharing": {**OPTIONS, HEADS: ENGINE + "test_heads.py::test_a_head_of_the_checkpoint"},
    "preemption": {LOOKUPS: ORACLE, MODEL: OPTIONS[MODEL], HEADS: LOSSLESS},
    "host tier": {LOOKUPS: ORACLE, MODEL: OPTIONS[MODEL]},
    "chunked prefill": {LOOKUPS: ORACLE, MODEL: LOSSLESS, HEADS: LOSSLESS},
    "adapters": {
        LOOKUPS: "tests/serving/adapters/test_drafts.py::test_each_adapter_says_what_it_says_without_drafts",
        MODEL: "tests/serving/adapters/test_drafts.py::test_each_adapter_says_what_it_says_without_drafts",
        HEADS: "tests/serving/adapters/test_drafts.py::test_each_adapter_says_what_it_says_without_drafts",
    },
    "int8": dict.fromkeys((LOOKUPS, MODEL), BOOT + "test_quantized") | {HEADS: BOOT + "test_a_head_is_quantized"},
    "int4": dict.fromkeys((LOOKUPS, MODEL), BOOT + "test_quantized") | {HEADS: BOOT + "test_a_head_is_quantized"},
    "pages of 8 bits, the default beside int8 and int4": dict.fromkeys((LOOKUPS, MODEL, HEADS), BOOT + "test_pages_of_8_bits"),
    "layers that keep a state": {
        LOOKUPS: ENGINE + "test_hybrid.py::test_prefixes_turns_and_preemption",
        MODEL: REFUSED + "a draft that keeps states",
        HEADS: LOSSLESS,
    },
    "layers with windows alone": {
        LOOKUPS: ENGINE + "scheduling/test_scheduler.py::test_random_walk_with_drafts",
        MODEL: REFUSED + "a draft model beside windows",
    },
    "meshes": {LOOKUPS: REPLICAS, HEADS: MESHES},
    "replicas": {LOOKUPS: REPLICAS, HEADS: MESHES},
    "several processes": dict.fromkeys((MODEL, HEADS), REFUSED + "several processes"),
    "num_scheduler_steps": {LOOKUPS: ORACLE, MODEL: BOOT + "test_several_steps_at_once", HEADS: REFUSED + "several steps"},
    "roles prefill and decode": dict.fromkeys((LOOKUPS, MODEL), TRAVEL),
    "several models in one server": dict.fromkeys((LOOKUPS, MODEL), FLEET),
    "images": {LOOKUPS: "tests/serving/media/test_images.py::test_drafts_change_no_token", MODEL: REFUSED + "images"},
    "sound": dict.fromkeys((LOOKUPS, MODEL, HEADS), REFUSED + "sound"),
    "models that transformers' code runs": {
        LOOKUPS: TRACED, HEADS: REFUSED + "a head of a traced model",
    },
    "encoders": dict.fromkeys((LOOKUPS, MODEL, HEADS), REFUSED + "an encoder"),
    "programs of a bundle": dict.fromkeys((LOOKUPS, MODEL, HEADS), REFUSED + "a bundle"),
}  # fmt: skip


@functools.cache
def _names(path: str) -> set[str]:
    """The functions of a file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kinds)}


def test_every_pair_has_its_test_or_its_refusal():
    for feature, kinds in PAIRS.items():
        for kind, held in kinds.items():
            if held.startswith(REFUSED):
                assert held.removeprefix(REFUSED) in REFUSALS, (feature, kind)
                continue
            path, _, name = held.partition("::")
            assert name in _names(path), (feature, kind, held)


# -- what is refused -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny_checkpoint(tmp_path_factory.mktemp("pairs") / "model")


@pytest.fixture(autouse=True)
def unread(monkeypatch):
    """Weights are never asked for."""

    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_model", read)


def windowed(folder: pathlib.Path) -> dict[str, Any]:
    write_tiny_checkpoint(folder / "windows")
    config = json.loads((folder / "windows" / "config.json").read_text())
    changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}
    (folder / "windows" / "config.json").write_text(json.dumps(config | changed))
    return {"model": str(folder / "windows")}


def hybrid(folder: pathlib.Path) -> dict[str, Any]:
    from tests.tiny_heads import write_mtp

    write_mtp(folder / "hybrid", "qwen3.5")
    return {"speculative_config": {"model": str(folder / "hybrid")}, "max_model_len": 64}


def encoder(folder: pathlib.Path) -> dict[str, Any]:
    import transformers

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 64,
    }
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(folder / "encoder")
    return {"model": str(folder / "encoder")}


def sound(folder: pathlib.Path) -> dict[str, Any]:
    from tests.models.tiny_whisper import save

    save(folder / "sound")
    return {"model": str(folder / "sound")}


def images(folder: pathlib.Path) -> dict[str, Any]:
    from tests.models import tiny_vision

    tiny_vision.save("Qwen2.5-VL", folder / "images")
    return {"model": str(folder / "images")}


def bundle(folder: pathlib.Path) -> dict[str, Any]:
    import jax

    from serving.engine.device.programs.bundle import FIXED, Bundle, here

    settings = {name: getattr(EngineConfig(), name) for name in FIXED}
    Bundle(folder, settings, {}, "", here(), jax.__version__, ()).write()
    return {"compiled": str(folder)}


def traced(folder: pathlib.Path) -> dict[str, Any]:
    return {}


NGRAM, MTP = {"method": "ngram"}, {"method": "mtp"}
REFUSALS: dict[str, tuple[Any, list[Any], str]] = {
    "a draft model beside windows": (windowed, [MODEL], "a draft model needs a model with a layer that attends to all positions"),
    "a draft that keeps states": (hybrid, [None], "has layers that keep a state; all of a draft's must attend"),
    "several processes": (lambda folder: {"coordinator": "host:1"}, [MODEL, MTP], "does not go with coordinator yet"),
    "several steps": (lambda folder: {"num_scheduler_steps": 2}, [MTP], "hears every step; set num_scheduler_steps, 2 here, to 1"),
    "an encoder": (encoder, [NGRAM, MODEL, MTP], "speculative_config is for models that generate; encoder is an encoder"),
    "sound": (sound, [NGRAM], "speculative_config does not go with a model for speech yet; leave it out"),
    "images": (images, [MODEL], "speculative_config: a draft model reads no images. Add language_model_only"),
    "a head of a traced model": (traced, [MTP, {"method": "eagle3", "model": "x"}], "whose layers nothing hears"),
    "a bundle": (bundle, [NGRAM, MODEL, MTP], "--speculative-config needs programs that bundles do not hold"),
}  # fmt: skip
"""Case -> (what writes it and says its settings, configurations of drafts, part of the sentence)."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_refused_before_weights_are_read(checkpoint, tmp_path, monkeypatch, case):
    made, hows, sentence = REFUSALS[case]
    monkeypatch.setattr(startup, "_lead", lambda *args: None)  # other processes are met before
    settings = {"model": str(checkpoint), "compile_cache": "", "progress": False} | made(tmp_path)
    if made is traced:
        opening = check.open_checkpoint

        def opened(source: Any) -> Any:
            found = opening(source)
            return dataclasses.replace(found, family=dataclasses.replace(found.family, traced=True))

        monkeypatch.setattr(check, "open_checkpoint", opened)
    for how in hows:
        if how == MODEL:
            how = {"model": settings["model"]}
        given = settings if how is None else settings | {"speculative_config": how}
        with pytest.raises(ValueError) as caught:
            start(EngineConfig(**given))
        assert sentence in str(caught.value)
