"""Tiny random models of every architecture: what transformers is told to make. `tiny_reference.py` makes them."""

from __future__ import annotations

from tests.models.tiny_base import BASE, Tiny
from tests.models.tiny_hybrid import HYBRID
from tests.models.tiny_sparse import SPARSE

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.3,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32}
DEEPSEEK = {
    "num_key_value_heads": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
}

MISTRAL4 = DEEPSEEK | {
    "first_k_dense_replace": 0,
    "qk_nope_head_dim": 8,
    "rope_parameters": MINISTRAL3_ROPE | {"partial_rotary_factor": 0.5},
}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
}

TINY: dict[str, Tiny] = {
    "llama": Tiny("LlamaConfig", "LlamaForCausalLM"),
    "llama, tied, one kv head": Tiny(
        "LlamaConfig", "LlamaForCausalLM", {"tie_word_embeddings": True, "num_key_value_heads": 1}
    ),
    "llama, biases, 9 heads": Tiny(
        "LlamaConfig",
        "LlamaForCausalLM",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "vocab_size": 383,
        },
    ),
    "llama, llama3 rope": Tiny("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE}),
    "llama, yarn rope": Tiny("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": YARN_ROPE}),
    "llama, linear rope": Tiny("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LINEAR_ROPE}),
    "mistral": Tiny("MistralConfig", "MistralForCausalLM", {"sliding_window": 16, "head_dim": 16}),
    "qwen2": Tiny("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen2, windows": Tiny(
        "Qwen2Config", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}
    ),
    "qwen3": Tiny("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma2": Tiny(
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "query_pre_attn_scalar": 16,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 16,
            "num_hidden_layers": 6,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 20,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gemma3, scaled by its heads": Tiny(
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite": Tiny(
        "GraniteConfig",
        "GraniteForCausalLM",
        {"embedding_multiplier": 6.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 4.0},
    ),
    "olmo2": Tiny("Olmo2Config", "Olmo2ForCausalLM"),
    "phi3, partial rotary": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "hidden_size": 128,
            "sliding_window": 24,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
    ),
    "phi3, longrope": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.5, 2.5, 6.0],
            },
        },
    ),
    "smollm3": Tiny("SmolLM3Config", "SmolLM3ForCausalLM", {"num_hidden_layers": 4}),
    "cohere 2": Tiny(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": 12, "logit_scale": 0.25, "tie_word_embeddings": True},
    ),
    "seed-oss": Tiny("SeedOssConfig", "SeedOssForCausalLM", {"head_dim": 16}),
    "exaone 4": Tiny(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "exaone 4, windows": Tiny(
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": 12, "sliding_window_pattern": 4},
    ),
    "minimax-m2": Tiny(
        "MiniMaxM2Config",
        "MiniMaxM2ForCausalLM",
        {
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 32,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
        expert_mesh=True,
    ),
    "glm-4.5": Tiny(
        "Glm4MoeConfig",
        "Glm4MoeForCausalLM",
        {
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
        },
        expert_mesh=True,
    ),
    "smollm3, windows": Tiny(
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        {"num_hidden_layers": 4, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 12},
    ),
    "starcoder2": Tiny(
        "Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": 16, "tie_word_embeddings": True}
    ),
    "mixtral": Tiny(
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        expert_mesh=True,
    ),
    "qwen2moe": Tiny(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        MOE | {"shared_expert_intermediate_size": 48, "num_hidden_layers": 3, "mlp_only_layers": [1]},
        expert_mesh=True,
    ),
    "qwen2moe, every layer": Tiny(
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 48}, expert_mesh=True
    ),
    "qwen3moe": Tiny(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        MOE | {"norm_topk_prob": True, "head_dim": 16},
        expert_mesh=True,
    ),
    "gpt-oss": Tiny(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 12,
            "rope_parameters": YARN_ROPE | {"truncate": False},
        },
        expert_mesh=True,
    ),
    "deepseek v2": Tiny(
        "DeepseekV2Config", "DeepseekV2ForCausalLM", DEEPSEEK | {"q_lora_rank": None}, expert_mesh=True
    ),
    "deepseek v2, groups": Tiny(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        DEEPSEEK | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
        expert_mesh=True,
    ),
    "deepseek v3": Tiny(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        DEEPSEEK
        | {"n_group": 4, "topk_group": 2, "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        expert_mesh=True,
    ),
    "glm-4.7 flash": Tiny(
        "Glm4MoeLiteConfig",
        "Glm4MoeLiteForCausalLM",
        {name: value for name, value in DEEPSEEK.items() if name != "first_k_dense_replace"}
        | {"num_hidden_layers": 3, "mlp_layer_types": ["dense", "sparse", "sparse"], "routed_scaling_factor": 1.8},
        expert_mesh=True,
    ),
    "llama4": Tiny(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "floor_scale": 8,
            "attention_chunk_size": 256,
        },
        expert_mesh=True,
    ),
    "llama4, chunks": Tiny(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 2,
            "no_rope_layer_interval": 2,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
            "attention_chunk_size": 24,
        },
        expert_mesh=True,
    ),
    "llama4, as published": Tiny(
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 80,
            "interleave_moe_layer_step": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "head_dim": 16,
        },
        expert_mesh=True,
    ),
    "ministral": Tiny(
        "MinistralConfig",
        "MinistralForCausalLM",
        {"sliding_window": 16, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "ministral 3": Tiny(
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE},
    ),
    "mistral small 3": Tiny(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        dict.fromkeys(BASE)
        | {
            "text_config": BASE
            | {"model_type": "ministral3", "head_dim": 16, "rope_parameters": MINISTRAL3_ROPE, "sliding_window": None},
            "vision_config": PIXTRAL,
            "image_token_index": 10,
        },
    ),
    "mistral 4": Tiny("Mistral4Config", "Mistral4ForCausalLM", MISTRAL4, expert_mesh=True),
    "mistral 4, groups, with vision": Tiny(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        dict.fromkeys(BASE)
        | {
            "text_config": BASE
            | MISTRAL4
            | {
                "model_type": "mistral4",
                "n_group": 4,
                "topk_group": 2,
                "first_k_dense_replace": 1,
                "q_lora_rank": None,
            },
            "vision_config": PIXTRAL,
            "image_token_index": 10,
        },
        expert_mesh=True,
    ),
    "gemma": Tiny("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "granitemoe": Tiny(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.4,
            "logits_scaling": 4.0,
        },
        expert_mesh=True,
    ),
    "olmo3": Tiny(
        "Olmo3Config",
        "Olmo3ForCausalLM",
        {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": YARN_ROPE,
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "olmoe": Tiny("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 8, "num_experts_per_tok": 3}, expert_mesh=True),
    "phi3, as in Phi-4-mini": Tiny(
        "Phi3Config",
        "Phi3ForCausalLM",
        {
            "hidden_size": 128,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.0, 1.1, 1.1, 1.2, 1.3],
                "long_factor": [1.0, 1.2, 1.5, 2.5, 4.0, 6.0],
            },
        },
    ),
    "gpt2": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 8, "tie_word_embeddings": True}
        | dict.fromkeys(k for k in BASE if k.startswith(("hidden", "num", "inter", "max"))),
    ),
    "gpt2, own head, scores by layer": Tiny(
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_positions": 256,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 8,
            "scale_attn_weights": False,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "relu2",
        }
        | dict.fromkeys(k for k in BASE if k.startswith(("hidden", "num", "inter", "max"))),
    ),
}

TINY |= HYBRID | SPARSE
