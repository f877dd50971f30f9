"""What configurations say that only some families heed."""

from __future__ import annotations

import pytest

from models.defaults import complete
from models.registry import find
from tests.models.tiny_base import BASE


def config_of(architecture: str, **fields):
    return find(architecture).config(complete(BASE | {"architectures": [architecture]} | fields))


@pytest.mark.parametrize(
    ("architecture", "dim"),
    [("LlamaForCausalLM", 16), ("Qwen2ForCausalLM", 16), ("Phi3ForCausalLM", 8), ("Qwen3NextForCausalLM", 8)],
)
def test_a_part_of_a_head_is_rotated_in_families_that_have_that(architecture, dim):
    """transformers' other families do not look at the field, and some files have it all the same."""
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    rope = config_of(architecture, hidden_size=128, head_dim=16, rope_parameters=parameters).rope
    assert rope is not None and rope.dim == dim


@pytest.mark.parametrize(
    ("architecture", "field"),
    [
        ("MambaForCausalLM", "hidden_act"),
        ("Mamba2ForCausalLM", "hidden_act"),
        ("JambaForCausalLM", "hidden_act"),
        ("BambaForCausalLM", "hidden_act"),
        ("FalconH1ForCausalLM", "hidden_act"),
        ("GraniteMoeHybridForCausalLM", "hidden_act"),
        ("NemotronHForCausalLM", "mamba_hidden_act"),
        ("KimiLinearForCausalLM", "hidden_act"),
        ("Qwen3NextForCausalLM", "hidden_act"),
        ("OlmoHybridForCausalLM", "hidden_act"),
    ],
)
def test_convolutions_have_the_activation_that_the_file_names(architecture, field):
    found = {mixer.activation for mixer in config_of(architecture, **{field: "relu"}).mixers if mixer is not None}
    assert found == {"relu"}


def test_what_is_rotated_is_pairs():
    with pytest.raises(ValueError, match="rotates 15 dimensions of a head; they turn in pairs"):
        config_of("LlamaForCausalLM", head_dim=15)
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}
    with pytest.raises(ValueError, match="rotates 19 dimensions"):
        config_of("Glm4MoeForCausalLM", head_dim=64, rope_parameters=part)


STRETCHED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [
        ("LlamaForCausalLM", STRETCHED),
        ("DeepseekV3ForCausalLM", STRETCHED),
        ("GlmMoeDsaForCausalLM", STRETCHED),
        ("Glm4MoeLiteForCausalLM", {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
    ],
)
def test_a_part_of_what_is_rotated_whole_is_refused(architecture, parameters):
    """No frequencies belong to it: transformers fails, or turns several pairs by one frequency where there is one left."""
    with pytest.raises(ValueError, match=r"partial_rotary_factor is 0\.5, and this network rotates all \d+ dimensions"):
        config_of(architecture, rope_parameters=parameters)


def test_a_stretched_part_of_a_head_is_read_in_families_that_rotate_a_part():
    rope = config_of("Phi3ForCausalLM", hidden_size=128, head_dim=16, rope_parameters=STRETCHED).rope
    assert rope is not None and (rope.dim, rope.factor) == (8, 2.0)


@pytest.mark.parametrize("architecture", ["GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"])
def test_attention_to_what_comes_after_is_no_decoders(architecture):
    with pytest.raises(ValueError, match="use_bidirectional_attention is set; this is no model that generates"):
        config_of(architecture, use_bidirectional_attention=True)


def test_fields_that_only_an_elder_or_younger_of_the_family_heeds():
    """As transformers' code has it: a file may have them all the same."""
    assert config_of("Gemma2ForCausalLM", attn_logit_softcapping=7.0).attn_softcap == 7.0
    assert config_of("Gemma3ForCausalLM", attn_logit_softcapping=7.0).attn_softcap is None
    v2, v3 = (config_of(f"DeepseekV{n}ForCausalLM", norm_topk_prob=True, num_experts_per_tok=2).moe for n in (2, 3))
    assert v2 is not None and v3 is not None and (v2.normalize, v3.normalize) == (False, True)
    assert config_of("DeepseekV2ForCausalLM", mlp_bias=True, num_experts_per_tok=2).mlp_bias
    assert not config_of("DeepseekV3ForCausalLM", mlp_bias=True).mlp_bias
    llama4 = config_of("Llama4ForCausalLM", attention_bias=True)
    assert llama4.qkv_bias and llama4.out_bias


@pytest.mark.parametrize(
    ("architecture", "most", "windows"),
    [
        ("Qwen2ForCausalLM", 2, (None, None, 5, 5)),
        ("Qwen3ForCausalLM", 2, (None, None, 5, 5)),
        ("Qwen2MoeForCausalLM", 3, (5, None, 5, None)),
        ("Qwen3MoeForCausalLM", 3, (5, 5, 5, 5)),
    ],
)
def test_which_layers_of_qwens_have_windows(architecture, most, windows):
    """As transformers has it where a file names no kinds of layers."""
    said = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": most, "num_hidden_layers": 4}
    assert config_of(architecture, **said).windows == windows


HYBRID = ("full_attention", "linear_attention")
KINDS = {
    "MistralForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Qwen2ForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Gemma2ForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Gemma3nForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Gemma4ForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Cohere2ForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "GptOssForCausalLM": ("layer_types", ("full_attention", "sliding_attention")),
    "Llama4ForCausalLM": ("layer_types", ("full_attention", "chunked_attention")),
    "Qwen3NextForCausalLM": ("layer_types", HYBRID),
    "GraniteMoeHybridForCausalLM": ("layer_types", HYBRID),
    "KimiLinearForCausalLM": ("layer_types", HYBRID),
    "OlmoHybridForCausalLM": ("layer_types", HYBRID),
    "BambaForCausalLM": ("layers_block_type", HYBRID),
    "Lfm2ForCausalLM": ("layer_types", ("full_attention", "conv")),
    "Glm4MoeLiteForCausalLM": ("mlp_layer_types", ("dense", "sparse")),
    "DeepseekV32ForCausalLM": ("mlp_layer_types", ("dense", "sparse")),
    "GlmMoeDsaForCausalLM": ("indexer_types", ("full", "shared")),
}
"""The fields that say what each layer is, and what they may say."""


@pytest.mark.parametrize("architecture", KINDS)
def test_a_kind_of_layer_that_a_family_does_not_have_is_refused(architecture):
    """As any other it would be computed as something else than the file says."""
    field, known = KINDS[architecture]
    window = {} if architecture == "Llama4ForCausalLM" else {"sliding_window": 8}
    told = {
        "num_hidden_layers": 3,
        "num_key_value_heads": 8,
        "num_kv_shared_layers": 0,
        "use_sliding_window": True,
        **window,
    }
    config_of(architecture, **told | {field: [known[0], known[1], known[0]]})
    with pytest.raises(ValueError, match=rf"config.json: {field} has \['some'\]; this family has "):
        config_of(architecture, **told | {field: [known[0], "some", known[0]]})
    with pytest.raises(ValueError, match=f"{field} has 2 entries for 3 layers"):
        config_of(architecture, **told | {field: list(known)})


def test_llama_4_attends_in_chunks_where_its_layer_types_say_so():
    told = {"num_hidden_layers": 4, "no_rope_layer_interval": 4, "attention_chunk_size": 8}
    assert config_of("Llama4ForCausalLM", **told).get("chunked") == (True, True, True, False)
    kinds = ["full_attention", "chunked_attention", "full_attention", "full_attention"]
    config = config_of("Llama4ForCausalLM", **told, layer_types=kinds)
    assert config.get("chunked") == (False, True, False, False)
    assert config.rope_layers == (True, True, True, False)


def test_an_odd_number_of_layers_has_windows_in_turn():
    assert config_of("GptOssForCausalLM", num_hidden_layers=3, sliding_window=8).windows == (8, None, 8)


@pytest.mark.parametrize(
    ("architecture", "fields", "why"),
    [
        (
            "LlamaForCausalLM",
            {"rms_norm_eps": 0.5},
            "layer 1 a rms_norm_eps of its own, 0.5. Layers of this family cannot",
        ),
        ("MistralForCausalLM", {"sliding_window": 7}, "layer 1 a sliding_window"),
        ("GemmaForSequenceClassification", {"skip": ["mlp"]}, "layer 1 a skip"),
        ("Gemma4ForCausalLM", {"intermediate_size": 7}, "differ in num_key_value_heads and head_dim"),
        ("Gemma4ForCausalLM", {"head_dim": 48}, "layer 1 heads of 48"),
    ],
)
def test_what_single_layers_have_of_their_own_is_heeded_or_refused(architecture, fields, why):
    """transformers lets every file say it, and a model that looks at none of it would be another one."""
    given = {"num_hidden_layers": 6, "head_dim": 16, "sliding_window": 8, "hidden_size": 64}
    whole = config_of(architecture, **given)
    same = config_of(
        architecture, **given, per_layer_config={"1": {"head_dim": 16}} if "4" not in architecture else None
    )
    assert same == whole
    with pytest.raises(ValueError, match=why):
        config_of(architecture, **given, per_layer_config={"1": fields})


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "DeepseekV3ForCausalLM"])
def test_rotations_by_kinds_of_layers_are_refused_where_all_rotate_alike(architecture):
    kinds = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": {}}
    with pytest.raises(ValueError, match=r"rotates layers by their kinds \(full_attention, sliding_attention\)"):
        config_of(architecture, rope_parameters=kinds)
