"""Which sampling parameters are in force where a request names none."""

import pytest

from serving.boot.sampling import CARDS, SamplingDefaults, sampling_defaults
from serving.engine.api.sampling_params import SamplingParams


def test_the_checkpoints_own_word_counts_alone():
    found = sampling_defaults({"temperature": 0.3, "top_k": None, "eos_token_id": 2}, ["Qwen3-8B"], chats=True)
    assert (dict(found.values), found.origin) == ({"temperature": 0.3}, "the checkpoint's own")


def test_what_cannot_be_in_force_is_left_out(caplog):
    assert dict(sampling_defaults({"temperature": -1.0, "top_p": 0.5}).values) == {"top_p": 0.5}
    assert "temperature" in caplog.text


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("SmolLM2-135M-Instruct", "llama"), {"temperature": 0.2, "top_p": 0.9}),
        (("Qwen3-8B", "qwen3"), {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        (("Qwen3-30B-A3B-Instruct-2507",), {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        (("Qwen3-Coder-30B-A3B-Instruct", "qwen3_moe"), {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        (("Qwen3-Coder-Next", "qwen3_next"), {"temperature": 1.0, "top_p": 0.95, "top_k": 40}),
        (("Qwen3-Next-80B-A3B-Thinking", "qwen3_next"), {"temperature": 0.6, "top_p": 0.95, "top_k": 20}),
        (("Qwen3.5-27B", "qwen3_5"), {"temperature": 1.0, "top_p": 0.95, "top_k": 20}),
        (("something", "qwen3_5_moe"), {"temperature": 1.0, "top_p": 0.95, "top_k": 20}),
        (("Kimi-K2-Instruct-0905",), {"temperature": 0.6}),
        (("Kimi-K2-Thinking",), {"temperature": 1.0}),
        (("GLM-4.5-Air",), {}),  # no card was at hand
        (("GLM-4.7-Flash",), {"temperature": 1.0, "top_p": 0.95}),
        (("Qwen2.5-Coder-0.5B-Instruct",), {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        (("DeepSeek-R1-Distill-Qwen-1.5B", "qwen2"), {"temperature": 0.6, "top_p": 0.95}),
        (("Gemma-3-270M-It", "gemma3_text"), {"temperature": 1.0, "top_p": 0.95, "top_k": 64}),
        (("Mistral-Small-3.2-24B-Instruct-2506",), {"temperature": 0.15}),
        (("LFM2-1.2B",), {"temperature": 0.3, "min_p": 0.15}),
        (("something", "gpt2"), {}),
    ],
)
def test_known_families_have_their_authors_values_where_the_checkpoint_is_silent(names, values):
    assert dict(sampling_defaults({"eos_token_id": 1}, names, chats=True).values) == values
    assert dict(sampling_defaults({}, names, chats=False).values) == {}  # a bare model has no recommendation


def test_recommendations_are_taken_and_leave_greedy_decoding_alone():
    for card in CARDS:
        params = SamplingParams(**{**card.values(), "temperature": 0.0})
        assert params.repetition_penalty == 1.0
        assert "repetition_penalty" not in card.values()


def test_what_is_in_force_reads_as_words():
    assert str(SamplingDefaults()) == "temperature 1 (the API's defaults)"
    found = sampling_defaults({}, ["smollm2"], chats=True)
    assert str(found) == "temperature 0.2, top_p 0.9 (recommended for SmolLM2)"
