"""What GGUF's metadata says of models whose layers differ: recurrent ones between attention, and Gemma 4's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.loading.gguf import GGUFFile


def of_family(arch: str, config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """The fields of a config.json that only these have; {} for others.

    Args:
        config: what all have.
        get: (key below the architecture, default) -> value; arrays as lists where their entries differ.
    """
    reader = _READERS.get(arch)
    return {} if reader is None else reader(config, get, file)


def _by_layer(value: Any, layers: int) -> list[Any]:
    return list(value)[:layers] if isinstance(value, list) else [value] * layers


def _delta(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    heads = get("ssm.time_step_rank")
    found = {
        "linear_num_key_heads": get("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": get("ssm.state_size"),
        "linear_value_head_dim": get("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "full_attention_interval": get("full_attention_interval", 4),
        "fused_inputs": "blk.0.ssm_in.weight" in file.tensors,
    }
    if get("expert_count"):
        found |= {
            "num_experts": get("expert_count"),
            "num_experts_per_tok": get("expert_used_count"),
            "moe_intermediate_size": get("expert_feed_forward_length"),
            "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
            "norm_topk_prob": True,
        }
    return found


def _gemma4(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers, kinds = config["num_hidden_layers"], config["layer_types"]
    narrow, wide = get("attention.key_length_swa"), get("attention.key_length")
    kv = _by_layer(get("attention.head_count_kv"), layers)
    ffw = _by_layer(get("feed_forward_length"), layers)
    full = kinds.index("full_attention")
    turning = 1.0
    if "rope_freqs.weight" in file.tensors:  # divisors: 1, and huge where a pair stands still
        turning = float(np.mean(file.read("rope_freqs.weight") < 1e20))
    return {
        "rope_scaling": None,
        "partial_rotary_factor": None,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": turning,
                "rope_theta": config["rope_theta"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": get("rope.freq_base_swa", 1e4)},
        },
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_key_value_heads": kv[kinds.index("sliding_attention")] if "sliding_attention" in kinds else kv[full],
        "num_global_key_value_heads": kv[full],
        "attention_k_eq_v": f"blk.{full}.attn_v.weight" not in file.tensors,
        "num_kv_shared_layers": get("attention.shared_kv_layers", 0),
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input", 0),
        "vocab_size_per_layer_input": config["vocab_size"],
        "intermediate_size": ffw[0],
        "use_double_wide_mlp": ffw[-1] == 2 * ffw[0],
        "final_logit_softcapping": get("final_logit_softcapping"),
        "enable_moe_block": bool(get("expert_count")),
        "num_experts": get("expert_count"),
        "top_k_experts": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "attention_bias": False,
    }


def _granite_hybrid(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], get("ssm.time_step_rank")
    mamba = [f"blk.{layer}.ssm_in.weight" in file.tensors for layer in range(layers)]
    experts, shared = get("expert_count") or 0, get("expert_shared_feed_forward_length")
    return {
        "layer_types": ["linear_attention" if is_mamba else "full_attention" for is_mamba in mamba],
        "mamba_n_heads": heads,
        "mamba_d_head": get("ssm.inner_size") // heads,
        "mamba_d_state": get("ssm.state_size"),
        "mamba_n_groups": get("ssm.group_count"),
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_expand": get("ssm.inner_size") // config["hidden_size"],
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "attention_bias": any(name.endswith("attn_q.bias") for name in file.tensors),
        "num_local_experts": experts,
        "num_experts_per_tok": get("expert_used_count") or 1,
        "shared_intermediate_size": shared or config["intermediate_size"],
        "position_embedding_type": None if get("rope.scaling.finetuned", True) is False else "rope",
        "partial_rotary_factor": None,
        "attention_multiplier": get("attention.scale"),
        "embedding_multiplier": get("embedding_scale"),
        "residual_multiplier": get("residual_scale"),
        "logits_scaling": get("logit_scale"),
    }


def _nemotron_h(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers, heads = config["num_hidden_layers"], get("ssm.time_step_rank")

    def kind(layer: int) -> str:
        has = {part: f"blk.{layer}.{part}.weight" in file.tensors for part in ("ssm_in", "attn_q", "ffn_up_exps")}
        if has["ssm_in"]:
            return "linear_attention"
        return "full_attention" if has["attn_q"] else "moe" if has["ffn_up_exps"] else "mlp"

    return {
        "layers_block_type": [kind(layer) for layer in range(layers)],
        "mamba_num_heads": heads,
        "mamba_head_dim": get("ssm.inner_size") // heads,
        "ssm_state_size": get("ssm.state_size"),
        "n_groups": get("ssm.group_count"),
        "conv_kernel": get("ssm.conv_kernel"),
        "use_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "layer_norm_epsilon": config["rms_norm_eps"],
        "partial_rotary_factor": None,
        "n_routed_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
        "moe_latent_size": get("moe_latent_size"),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(get("expert_weights_norm", True)),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
    }


def _lfm2(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    conv = [f"blk.{layer}.shortconv.conv.weight" in file.tensors for layer in layers]
    return {
        "layer_types": ["conv" if is_conv else "full_attention" for is_conv in conv],
        "conv_L_cache": get("shortconv.l_cache"),
        "norm_eps": config["rms_norm_eps"],
        "block_auto_adjust_ff_dim": False,
    }


_READERS = {
    "qwen3next": _delta,
    "qwen35": _delta,
    "qwen35moe": _delta,
    "gemma4": _gemma4,
    "granitehybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "lfm2": _lfm2,
}
