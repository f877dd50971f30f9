"""What config.json leaves out, against transformers' own configuration classes."""

from __future__ import annotations

import json

import pytest

from models import defaults
from models.loading.hf_config import read_config
from models.registry import families, find
from tests.models.defaults import files, text_class
from tests.models.tiny import TINY
from tests.models.tiny_base import BASE

ARCHITECTURES = sorted({name for family in families() for name in family.architectures if text_class(name)})
ODD = ("Glm4MoeForCausalLM", "Glm4vMoeForConditionalGeneration")
"""Half of a head rotates, and the heads of transformers' default, which no checkpoint has, have 42 numbers."""


def test_the_table_is_transformers():
    for file, text in files().items():
        assert file.read_text() == text, "run python -m tests.models.defaults"


def read(tmp_path, architecture, fields):
    """What our reader makes of a config.json with these fields; one label, so that rerankers are not refused."""
    fields = {"id2label": {"0": "LABEL_0"}} | fields | {"architectures": [architecture]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    # Whether the embeddings are tied is settled with the weights.
    return find(architecture).config(read_config(tmp_path) | {"tie_word_embeddings": True})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_empty_configuration_is_the_default_one(tmp_path, architecture):
    whole = text_class(architecture)().to_dict()
    whole.pop("id2label", None)
    least = (
        {"num_experts_per_tok": 6} if whole.get("num_experts_per_tok", 0) is None else {}
    )  # no number in transformers
    if architecture == "Gemma3TextModel":
        least |= {"use_bidirectional_attention": True}  # an encoder here
    if architecture in ODD:
        for fields in (least, whole | least):
            with pytest.raises(ValueError, match="rotates 21 dimensions"):
                read(tmp_path, architecture, fields)
        return
    assert read(tmp_path, architecture, least) == read(tmp_path, architecture, whole | least)


@pytest.mark.parametrize("name", [name for name, tiny in TINY.items() if "text_config" not in tiny.fields])
def test_fields_left_out_are_those_that_transformers_fills_in(tmp_path, name):
    """The variants' own fields against all fields that transformers derives from them."""
    import transformers

    tiny = TINY[name]
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None or key not in BASE}
    whole = getattr(transformers, tiny.config)(**json.loads(json.dumps(fields))).to_dict()
    assert read(tmp_path, tiny.model, fields) == read(tmp_path, tiny.model, whole)


def test_a_files_other_name_for_a_field_is_not_overruled():
    mixtral = defaults.complete({"architectures": ["MixtralForCausalLM"], "num_experts": 4})
    assert mixtral["num_local_experts"] == 4


def test_a_files_own_scaling_replaces_the_familys():
    hf = {"model_type": "gpt_oss", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert "rope_parameters" not in defaults.complete(hf)
    assert defaults.complete({"model_type": "gpt_oss"})["rope_parameters"]["factor"] == 32.0


def test_smollm3_has_windows_where_it_does_not_rotate(tmp_path):
    config = read(
        tmp_path, "SmolLM3ForCausalLM", {"num_hidden_layers": 8, "use_sliding_window": True, "sliding_window": 64}
    )
    assert config.windows == (None, None, None, 64) * 2
    assert config.rope_layers == (True, True, True, False) * 2


@pytest.mark.parametrize(
    ("scaling", "positions", "wanted"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 40960, (4.0, 131072)),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 32768, (4.0, 131072)),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 131072, (4.0, 131072)),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}, 16384, (4.0, 16384)),
        ({"rope_type": "linear", "factor": 4.0}, 4096, (4.0, 16384)),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 131072, (8.0, 131072)),
    ],
)
def test_scaled_positions(tmp_path, scaling, positions, wanted):
    """As model cards say: the scaling is added, `max_position_embeddings` stays; or it is stretched already."""
    config = read(tmp_path, "Qwen2ForCausalLM", {"rope_scaling": scaling, "max_position_embeddings": positions})
    assert config.rope is not None
    assert (config.rope.factor, config.max_positions) == wanted


def test_dynamic_ntk_waits_for_longer_contexts(tmp_path):
    config = read(tmp_path, "LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    assert (config.max_positions, config.longest_positions) == (2048, 4096)


def test_an_unknown_activation_is_refused_with_the_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"'xielu' is not supported; known ones are gelu"):
        read(tmp_path, "LlamaForCausalLM", {"hidden_act": "xielu"})


def test_gpt2_scales_attention_as_told(tmp_path):
    config = read(tmp_path, "GPT2LMHeadModel", {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True})
    assert (config.attn_scale, config.get("scale_by_layer")) == (1.0, True)
