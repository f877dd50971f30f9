"""Images meet everything else, and everything that is sent to do harm meets them: each has a test, or a start refuses it."""

from __future__ import annotations

import ast
import functools
import pathlib
import types

import pytest

from serving.boot.senses import tower

ROOT = pathlib.Path(__file__).parents[3]

HERE = "tests/serving/media/"
ENGINE = HERE + "test_images.py::"
REQUESTS = HERE + "test_requests.py::"
ATTACKS = HERE + "test_attacks.py::"
FETCHING = HERE + "test_fetching.py::"
BATCH = ENGINE + "test_images_and_texts_in_one_batch_cut_and_preempted"
MASKS = ENGINE + "test_several_answers_log_probabilities_and_masks"
MESHES = HERE + "test_mesh.py::test_every_family_on_two_devices"
REFUSALS = "tests/serving/boot/test_draft_pairs.py::test_what_is_refused_is_refused_before_weights_are_read"

PAIRS: dict[str, str] = {
    "texts alone in the same batch": BATCH,
    "prompts cut inside an image": BATCH,
    "preemption": BATCH,
    "prefix sharing": ENGINE + "test_a_prefix_is_found_up_to_inside_an_image_and_never_anothers",
    "one image of many requests": ENGINE + "test_one_image_of_32_requests_is_encoded_once",
    "no compilation over all sizes": ENGINE + "test_any_size",
    "videos": ENGINE + "test_videos_beside_images_and_texts_and_a_prefix_that_ends_inside_one",
    "embeddings": ENGINE + "test_an_embedding_of_a_chat_with_an_image",
    "drafts: lookups": ENGINE + "test_drafts_change_no_token",
    "drafts: models": REFUSALS,
    "grammars": ENGINE + "test_an_answer_that_a_grammar_allows",
    "tokens that are allowed": MASKS,
    "n": MASKS,
    "log probabilities, of prompts too": MASKS,
    "adapters": "tests/serving/adapters/test_media.py::test_images_with_an_adapter_are_those_of_peft",
    "int8": "tests/models/encoders/vision/test_towers.py::test_a_rounded_tower_says_nearly_the_same",
    "mesh model=2": MESHES,
    "mesh data=2, replicas": MESHES,
    "several processes, bundles of programs": HERE + "test_pairs.py::test_what_reads_no_images_is_refused",
    "GGUF with its mmproj": HERE + "test_mmproj.py::test_a_chat_with_images_over_http",
    "plans": "tests/serving/plan/test_plan.py::test_a_tower_is_its_weights_and_room_for_what_it_makes",
    "batch files": REQUESTS + "test_a_line_of_a_batch_has_an_image",
    "responses, messages, Ollama": REQUESTS + "test_over_http",
    "gRPC": REQUESTS + "test_over_grpc_a_part_is_a_file_or_a_url",
    "files": REQUESTS + "test_a_file_is_read_as_its_text",
}  # fmt: skip

HARM: dict[str, str] = {
    "addresses inside, by name": FETCHING + "test_a_name_that_means_something_inside_is_not_connected_to",
    "addresses inside, in disguise": ATTACKS + "test_hosts_in_disguise_are_not_connected_to",
    "a name that changes its meaning": FETCHING + "test_what_is_allowed_is_fetched_from_the_address_that_was_looked_at",
    "redirects, answers without end": FETCHING + "test_nobody_is_redirected_and_nothing_is_read_without_end",
    "files beside the folder": FETCHING + "test_files_below_the_folder_alone",
    "bombs": ATTACKS + "test_texts_that_grow_inside_an_image",
    "sizes of 65,535 and headers that lie": ATTACKS + "test_sizes_that_lie_cost_nothing",
    "sizes before pixels": FETCHING + "test_sizes_are_looked_at_before_pixels",
    "images of 1 x 1": ENGINE + "test_any_size",
    "truncated files, in the same words": FETCHING + "test_damaged_files_are_refused_in_the_same_words",
    "files that are two things": ATTACKS + "test_what_is_an_image_and_something_else_is_that_image",
    "SVG, fonts, and other formats": ATTACKS + "test_what_is_no_image_is_opened_by_nobody",
    "a thousand images": ATTACKS + "test_a_thousand_images_are_counted_before_any_is_read",
    "pixels of all images together": ATTACKS + "test_pixels_of_a_request_are_counted_before_they_are_unpacked",
    "a thousand frames": ATTACKS + "test_of_many_frames_one_is_read",
    "another tenant's embeddings": REQUESTS + "test_digests_tell_images_processings_and_tenants_apart_and_nothing_else",
    "names that others gave": REQUESTS + "test_a_uuid_names_an_image_for_its_sender_alone",
    "places that users type": REQUESTS + "test_text_that_looks_like_a_place_is_none",
    "damaged files by the thousand": "tests/fuzz/test_fuzz.py::test_nothing_crashes_hangs_or_tells",
}  # fmt: skip


@functools.cache
def _names(path: str) -> set[str]:
    """The functions of a file."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("table", [PAIRS, HARM], ids=["pairs", "harm"])
def test_each_has_its_test(table):
    for what, held in table.items():
        path, _, name = held.partition("::")
        assert name in _names(path), (what, held)


@pytest.mark.parametrize("name", tower.ALONE)
def test_what_reads_no_images_is_refused(name, monkeypatch):
    monkeypatch.setattr(tower, "why_not", lambda opened: None)
    said = {"language_model_only": False, "speculative_config": None} | dict.fromkeys(tower.ALONE) | {name: "somewhere"}
    opened = types.SimpleNamespace(family=types.SimpleNamespace(tower=types.SimpleNamespace(reads="image")))
    with pytest.raises(ValueError, match=f"{name}: images are not read with it yet. Add language_model_only"):
        tower.check_tower(types.SimpleNamespace(**said), opened, None, None, 64, False)
