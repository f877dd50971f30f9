"""Adapters meet everything else: each pair has a test that holds it to what peft or a request alone says, or a start refuses it."""

from __future__ import annotations

import ast
import functools
import pathlib
from typing import Any

import pytest

from serving.boot import load, startup
from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from tests.serving.boot.test_draft_pairs import bundle, encoder, sound
from tests.tiny_checkpoint import write_tiny_checkpoint

ROOT = pathlib.Path(__file__).parents[3]

REFUSED = "refused: "
"""What begins so is the name of a case of REFUSALS; the rest are tests."""

HERE = "tests/serving/adapters/"
ENGINE = HERE + "test_llm_adapters.py::"
SECURITY = HERE + "test_security.py::"
SURFACE = HERE + "test_surface.py::"
TARGETS = HERE + "test_targets.py::"
MESHES = HERE + "test_mesh.py::test_the_tokens_of_peft_in_one_batch_while_a_fifth_comes_and_goes"
DRAFTS = HERE + "test_drafts.py::test_each_adapter_says_what_it_says_without_drafts"

PAIRS: dict[str, str] = {
    "the base and others in one batch": ENGINE + "test_all_mixed_with_the_base_and_no_page_shared",
    "prefix sharing": ENGINE + "test_all_mixed_with_the_base_and_no_page_shared",
    "the same name with other content": ENGINE + "test_the_same_name_with_other_content_shares_nothing",
    "more adapters than slots": ENGINE + "test_more_adapters_than_slots_and_no_compilation",
    "preemption": ENGINE + "test_preempted_pages_and_those_in_host_memory_are_each_adapters_own",
    "the host tier": ENGINE + "test_preempted_pages_and_those_in_host_memory_are_each_adapters_own",
    "sleep and wake": ENGINE + "test_after_a_sleep_adapters_are_loaded_anew",
    "embeddings": ENGINE + "test_vectors_and_scores_are_those_of_the_adapter",
    "score and rerank": ENGINE + "test_vectors_and_scores_are_those_of_the_adapter",
    "drafts: lookups, a draft model, heads": DRAFTS,
    "grammars": TARGETS + "test_several_completions_and_grammars_with_an_adapter",
    "n": TARGETS + "test_several_completions_and_grammars_with_an_adapter",
    "log probabilities, of prompts too": TARGETS + "test_log_probabilities_of_prompts_and_completions",
    "int8": TARGETS + "test_beside_packed_weights_the_change_is_the_same",
    "int4": TARGETS + "test_beside_packed_weights_the_change_is_the_same",
    "tied and untied heads, embeddings": TARGETS + "test_embeddings_and_heads_mixed_with_the_base",
    "num_scheduler_steps": TARGETS + "test_several_steps_at_once_and_weights_that_were_kept_say_the_same",
    "kept weights": TARGETS + "test_several_steps_at_once_and_weights_that_were_kept_say_the_same",
    "a template and tokens of its own": TARGETS + "test_an_adapters_own_template_and_tokens_are_used_for_it",
    "experts": HERE + "test_experts.py::test_both_layouts_mixed_with_the_base",
    "experts that are packed": "tests/models/adapters/test_attach.py::"
    "test_experts_that_are_packed_and_tensors_of_which_a_part_takes_none_are_told_of",
    "every family, recurrent layers among them": "tests/models/adapters/test_attach.py::test_every_stack_is_read",
    "routers, gates of states": "tests/models/adapters/test_against_peft.py::test_all_linear_weights",
    "the default model": "tests/e2e/test_adapters.py::test_five_adapters_mixed_with_the_base_in_one_batch",
    "models that transformers' code runs": "tests/models/bridge/test_engine.py::test_an_adapter_changes_logits_as_pefts_does",
    "mesh model=2": MESHES,
    "mesh data=2, replicas": MESHES,
    "several processes": HERE + "test_mesh.py::test_two_processes_load_the_same",
    "images": HERE + "test_media.py::test_images_with_an_adapter_are_those_of_peft",
    "sound": REFUSED + "sound",
    "encoders": REFUSED + "an encoder",
    "programs of a bundle": REFUSED + "a bundle",
    "plans": "tests/serving/plan/test_plan.py::test_room_for_adapters_is_memory_that_pages_do_not_have",
    "roles prefill and decode": "tests/serving/transfer/test_adapters.py::test_pages_of_an_adapter_travel_and_are_never_anothers",
    "travelling pages are known by content": "tests/serving/transfer/test_config.py::test_a_page_is_known_by_all_that_decides_it",
    "several models in one server": "tests/serving/fleet/test_over_http.py::"
    "test_a_request_for_an_adapter_loads_its_model_and_then_the_adapter",
    "batch files": SURFACE + "test_a_batch_names_adapters_line_by_line",
    "gateways": SURFACE + "test_a_gateway_serves_what_its_engines_have",
    "routing": "tests/serving/routing/test_router.py::test_an_adapter_goes_where_it_is",
    "tenants": SURFACE + "test_an_adapter_of_some_keys_is_there_for_nobody_else",
    "resolvers": SURFACE + "test_resolvers_find_what_nobody_loaded",
    "what runs while it is unloaded or replaced": SECURITY + "test_what_runs_ends_with_the_adapter_that_it_began_with",
    "events of cached pages": "tests/serving/kv_events/test_zmq.py::test_subscribers_of_arrays_read_them",
    "memory for pages": "tests/serving/engine/device/test_sizing.py::test_what_adapters_take_is_not_the_pages",
}  # fmt: skip


@functools.cache
def _names(path: str) -> set[str]:
    """The functions of a file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kinds)}


def test_every_pair_has_its_test_or_its_refusal():
    for feature, held in PAIRS.items():
        if held.startswith(REFUSED):
            assert held.removeprefix(REFUSED) in REFUSALS, feature
            continue
        path, _, name = held.partition("::")
        assert name in _names(path), (feature, held)


REFUSALS: dict[str, tuple[Any, str]] = {
    "an encoder": (encoder, "enable_lora is for models that generate; encoder is an encoder"),
    "sound": (sound, "enable_lora and language_model_only do not go with a model for speech"),
    "a bundle": (bundle, "--enable-lora needs programs that bundles do not hold"),
}
"""Case -> (what writes it and says its settings, part of the sentence)."""


@pytest.mark.parametrize("case", REFUSALS)
def test_what_is_refused_is_refused_before_weights_are_read(tmp_path, monkeypatch, case):
    made, sentence = REFUSALS[case]

    def read(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(load, "load_model", read)
    monkeypatch.setattr(startup, "_lead", lambda *args: None)
    model = write_tiny_checkpoint(tmp_path / "model")
    settings = {"model": str(model), "compile_cache": "", "progress": False, "enable_lora": True} | made(tmp_path)
    with pytest.raises(ValueError) as caught:
        start(EngineConfig(**settings))
    assert sentence in str(caught.value)
