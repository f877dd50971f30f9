"""Tiny random models of whatever decoder transformers has, and what it computes of them."""

from __future__ import annotations

from typing import Any

import numpy as np

SMALL: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "sliding_window": 16, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8,
    "moe_num_experts": 8, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "ffn_dim": 96, "rotary_dim": 8, "n_inner": 96, "attention_window": 16, "local_attention": 16, "window_size": 16,
    "num_dense_layers": 1, "moe_layer_start_index": 1, "word_embed_proj_dim": 64, "query_pre_attn_scalar": 16,
    "expert_ffn_hidden_size": 32, "ffn_hidden_size": 96, "moe_ffn_hidden_size": 32, "num_mem_blocks": 1,
    "shared_intermediate_size": 32,
    "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": 8, "state_size": 8, "time_step_rank": 8,
    "dim_model": 64, "dim_ff": 96, "dim_head": 16, "embedding_size": 64, "lm_head_multiplier": 1.0, "mup_base_width": 64,
    "swa_head_dim": 16, "swa_v_head_dim": 12, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "global_head_dim": 16, "attention_chunk_size": 16, "dense_intermediate_size": 96, "moe_shared_expert_intermediate_size": 32,
}  # fmt: skip
"""Small values of the fields that configurations have; those that one has not are left out."""

OTHER: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "modernbert-decoder": {"global_attn_every_n_layers": 2},
    "phimoe": {"sliding_window": None},
    "openai-gpt": {"n_positions": 256},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        },
    },
    "minicpm3": {"num_key_value_heads": 4},
    "youtu": {"num_key_value_heads": 4, "head_dim": 8},
    "axk1": {"num_key_value_heads": 4, "head_dim": 8},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {"num_key_value_heads": 4, "head_dim": 8},
    "deepseek_v32": {"num_key_value_heads": 4, "head_dim": 8},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "head_dim": 16, "global_head_dim": 16, "vocab_size_per_layer_input": 384, "hidden_size_per_layer_input": 16,
    },
    "longcat_flash": {"num_key_value_heads": 4, "num_layers": 2, "head_dim": 8},
    "axk2": {"num_key_value_heads": 4, "head_dim": 8},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "bitnet": {"tie_word_embeddings": False},
    "mpt": {},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2},
    },
} | {
    kind: {"is_decoder": True}
    for kind in (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    )
} | {"xmod": {"is_decoder": True, "default_language": "en_XX"}}  # fmt: skip
"""What single types need besides."""

PROMPTS, NEW = (45, 7), 8


def configuration(kind: str, **fields: Any) -> Any:
    """A tiny configuration of one of transformers' types.

    Raises:
        ValueError: it is made of others', which would stay as large as they are.
    """
    import transformers

    made = transformers.CONFIG_MAPPING[kind]
    if made.sub_configs and kind not in OTHER:
        raise ValueError(f"a model of several parts ({', '.join(made.sub_configs)}), of which none is made small here")
    default = made()
    told = {name: value for name, value in SMALL.items() if _has(default, name)} | OTHER.get(kind, {}) | fields
    given = not isinstance(getattr(type(default), "layer_types", None), property)
    if given and "layer_types" not in fields and isinstance(getattr(default, "layer_types", None), list | tuple):
        told["num_hidden_layers"] = 4  # so that kinds of layers take turns
        kinds = list(dict.fromkeys(default.layer_types))
        told["layer_types"] = [kinds[index % len(kinds)] for index in range(4)]
    return made(**told)


def _has(config: Any, name: str) -> bool:
    if isinstance(getattr(type(config), name, None), property):
        return False
    try:
        value = getattr(config, name)
    except (AttributeError, RuntimeError):  # the latter where layers differ in it
        return False
    return value is not None or name in ("num_key_value_heads", "head_dim")


def model(kind: str, architecture: str, **fields: Any) -> Any:
    """A tiny random model, its weights as large as trained ones."""
    import torch
    import transformers

    torch.manual_seed(sum(kind.encode()))
    made = getattr(transformers, architecture)(configuration(kind, **fields)).eval().float()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            elif name.endswith("A_log"):
                parameter.normal_(-2.0, 1.0)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
        for name, buffer in made.named_buffers():
            if "bias" in name and buffer.is_floating_point() and buffer.dim() == 1:  # what routers add
                buffer.normal_(0.0, 0.1)
    return made


def expected(made: Any, prompts: tuple[int, ...] = PROMPTS, new: int = NEW) -> list[tuple[list[int], np.ndarray]]:
    """Of prompts of so many tokens (all tokens with `new` greedy ones behind, logits [n, V] of all but the last)."""
    import torch

    rng = np.random.default_rng(7)
    vocab = made.config.get_text_config().vocab_size
    told = []
    with torch.no_grad():
        for length in prompts:
            tokens = rng.integers(3, vocab, length).tolist()
            for _ in range(new):
                logits = made(torch.tensor([tokens])).logits[0].float()
                tokens.append(int(logits[-1].argmax()))
            told.append((tokens, logits.numpy()))
    return told
