"""Tiny random models whose attention is sparse behind an indexer. With 16 heads no score is exactly 0: there transformers' choice
would depend on how it sorts."""

from __future__ import annotations

from tests.models.tiny_base import Tiny

SPARSE_BASE = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "index_n_heads": 16,
    "index_head_dim": 16,
}

SPARSE: dict[str, Tiny] = {
    "deepseek v3.2": Tiny(
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        SPARSE_BASE
        | {
            "n_group": 4,
            "topk_group": 2,
            "index_topk": 24,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
        expert_mesh=True,
    ),
    "deepseek v3.2, everything chosen": Tiny(
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        SPARSE_BASE | {"n_group": 1, "topk_group": 1, "index_topk": 256, "first_k_dense_replace": 2},
        expert_mesh=True,
    ),
    "glm-5": Tiny(
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        SPARSE_BASE | {"index_topk": 9, "mlp_layer_types": ["dense", "sparse", "sparse"], "attention_bias": True},
        expert_mesh=True,
    ),
    "glm-5, layers that share": Tiny(
        "GlmMoeDsaConfig",
        "GlmMoeDsaForCausalLM",
        SPARSE_BASE
        | {
            "num_hidden_layers": 4,
            "index_topk": 20,
            "indexer_types": ["full", "shared", "shared", "full"],
            "mlp_layer_types": ["dense"] * 3 + ["sparse"],
        },
        expert_mesh=True,
    ),
}
