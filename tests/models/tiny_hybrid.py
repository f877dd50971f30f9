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

HYBRID: dict[str, Tiny] = {
    "qwen3-next": Tiny(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        DELTA | MOE | {"norm_topk_prob": True, "mlp_only_layers": [1]},
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
