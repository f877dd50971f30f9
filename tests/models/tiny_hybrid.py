"""Tiny random models of families whose layers differ: recurrent ones between attention."""

from __future__ import annotations

from tests.models.tiny_base import BASE, Tiny

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
DELTA = {
    "num_hidden_layers": 4,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

MAMBA = {"mamba_n_heads": 8, "mamba_d_state": 16, "mamba_n_groups": 2, "num_hidden_layers": 4}
GRANITE = {
    "shared_intermediate_size": 48,
    "embedding_multiplier": 6.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.4,
    "logits_scaling": 4.0,
}
NEMOTRON = {
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 4,
    "layer_norm_epsilon": 1e-5,
}
GEMMA4 = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 12,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 384,
    "tie_word_embeddings": True,
}

FALCON_H1 = MAMBA | {
    "num_hidden_layers": 2,
    "mamba_d_ssm": 64,
    "mamba_d_head": 8,
    "head_dim": 16,
    "num_key_value_heads": 2,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.1,
    "ssm_multipliers": [0.8, 1.1, 0.9, 1.2, 0.7],
    "mlp_multipliers": [0.9, 1.3],
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.4,
}
NO_ATTENTION = dict.fromkeys(
    ("intermediate_size", "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
)

# transformers writes three equal parts of q's, k's and v's taps: only where they are as wide does it write what it reads.
OLMO_HYBRID = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}

HYBRID: dict[str, Tiny] = {
    "olmo hybrid": Tiny("OlmoHybridConfig", "OlmoHybridForCausalLM", OLMO_HYBRID),
    "olmo hybrid, no positions": Tiny(
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        OLMO_HYBRID
        | {"rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False},
    ),
    "falcon h1": Tiny("FalconH1Config", "FalconH1ForCausalLM", FALCON_H1),
    "falcon h1, norms": Tiny(
        "FalconH1Config", "FalconH1ForCausalLM", FALCON_H1 | {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
    ),
    "bamba": Tiny(
        "BambaConfig", "BambaForCausalLM", MAMBA | {"attn_layer_indices": [1, 3], "mamba_d_head": 16}, cached=False
    ),
    "mamba": Tiny("MambaConfig", "MambaForCausalLM", NO_ATTENTION | {"tie_word_embeddings": True, "time_step_rank": 8}),
    "falcon mamba": Tiny(
        "FalconMambaConfig", "FalconMambaForCausalLM", NO_ATTENTION | {"use_bias": True, "time_step_rank": 8}
    ),
    "mamba 2": Tiny(
        "Mamba2Config",
        "Mamba2ForCausalLM",
        NO_ATTENTION | {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
    ),
    "jamba": Tiny(
        "JambaConfig",
        "JambaForCausalLM",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
        },
        expert_mesh=True,
    ),
    "gemma 4, per-layer embeddings, shared pages": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        GEMMA4
        | {
            "hidden_size_per_layer_input": 16,
            "num_kv_shared_layers": 3,
            "num_key_value_heads": 1,
            "use_double_wide_mlp": True,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma 4, experts": Tiny(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        GEMMA4
        | {
            "attention_k_eq_v": True,
            "num_key_value_heads": 4,  # of half the size, and half as many numbers, as in 26B-A4B and 31B
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
        },
        expert_mesh=True,
    ),
    "gemma 3n": Tiny(
        "Gemma3nTextConfig",
        "Gemma3nForCausalLM",
        {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
            "head_dim": 16,
            "num_key_value_heads": 2,
            "sliding_window": 12,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 300,
            "laurel_rank": 8,
            "num_kv_shared_layers": 3,
            "activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0, 0.0, 0.0],
            "tie_word_embeddings": True,
        },
    ),
    "granite 4": Tiny(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        MAMBA | GRANITE | {"num_local_experts": 0, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
    "granite 4, experts, positions": Tiny(
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        MAMBA
        | GRANITE
        | {
            "num_local_experts": 4,
            "position_embedding_type": "rope",
            "mamba_n_groups": 1,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_hidden_layers": 3,
        },
        expert_mesh=True,
    ),
    "kimi linear": Tiny(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "num_key_value_heads": 8,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_group": 4,
            "topk_group": 2,
        },
        expert_mesh=True,
    ),
    "lfm2": Tiny(
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"], "block_multiple_of": 16},
    ),
    "lfm2 moe": Tiny(
        "Lfm2MoeConfig",
        "Lfm2MoeForCausalLM",
        {
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "num_dense_layers": 1,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
        },
        expert_mesh=True,
    ),
    "nemotron-h": Tiny(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        NEMOTRON
        | {"num_hidden_layers": None, "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"]},
    ),
    "nemotron-h, experts": Tiny(
        "NemotronHConfig",
        "NemotronHForCausalLM",
        NEMOTRON
        | {
            "num_hidden_layers": None,
            "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 48,
            "moe_latent_size": 32,
            "routed_scaling_factor": 2.0,
        },
        expert_mesh=True,
    ),
    "qwen3-next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DELTA | MOE | {"norm_topk_prob": True},
        expert_mesh=True,
    ),
    "qwen3.5": Tiny(
        "Qwen3_5TextConfig", "Qwen3_5ForCausalLM", DELTA | {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
    ),
    "qwen3.5 moe": Tiny(
        "Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM", DELTA | MOE | {"intermediate_size": None}, expert_mesh=True
    ),
    "qwen3.5, with vision": Tiny(
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        dict.fromkeys(BASE)
        | {
            "text_config": BASE
            | DELTA
            | {"model_type": "qwen3_5_text", "num_hidden_layers": 2, "full_attention_interval": 2},
            "vision_config": {
                "model_type": "qwen3_5_vision",
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
            },
        },
    ),
}
