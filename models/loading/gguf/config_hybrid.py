"""What GGUF's metadata says of models whose layers differ: recurrent ones between attention, and Gemma 3n's and 4's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from models.loading.gguf.file import GGUFFile


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


def _gemma3n(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers = config["num_hidden_layers"]
    steepness = _by_layer(get("activation_sparsity_scale", 0.0), layers)
    return {
        "rope_local_base_freq": get("rope.freq_base_swa", 1e4),
        "num_kv_shared_layers": int(get("attention.shared_kv_layers", 0)),  # published files have a float
        "hidden_size_per_layer_input": get("embedding_length_per_layer_input"),
        "vocab_size_per_layer_input": file.tensors["per_layer_token_embd.weight"].shape[0],
        "intermediate_size": _by_layer(get("feed_forward_length"), layers),
        # Of a normal distribution so much lies below so many deviations; 0 stands for a block without a threshold.
        "activation_sparsity_pattern": [NormalDist().cdf(scale) if scale else 0.0 for scale in map(float, steepness)],
        "altup_num_inputs": get("altup.num_inputs"),
        "altup_active_idx": get("altup.active_idx", 0),
        "altup_correct_scale": True,
        "laurel_rank": file.tensors["blk.0.laurel_l.weight"].shape[0],
        "final_logit_softcapping": get("final_logit_softcapping", 30.0),
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


def _lfm2_moe(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    return _lfm2(config, get, file) | {
        "num_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "num_dense_layers": get("leading_dense_block_count", 0),
        "use_expert_bias": any(name.endswith("exp_probs_b.bias") for name in file.tensors),
    }


def _falcon_h1(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """The converter has multiplied the weights by the model's factors."""
    heads, bias = get("ssm.time_step_rank"), "blk.0.ssm_in.bias" in file.tensors
    return {
        "mamba_d_ssm": get("ssm.inner_size"),
        "mamba_n_heads": heads,
        "mamba_d_head": get("ssm.inner_size") // heads,
        "mamba_d_state": get("ssm.state_size"),
        "mamba_n_groups": get("ssm.group_count"),
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_conv_bias": "blk.0.ssm_conv1d.bias" in file.tensors,
        "mamba_proj_bias": bias,
        "projectors_bias": bias,
        "mamba_rms_norm": "blk.0.ssm_norm.weight" in file.tensors,
        "mamba_norm_before_gate": False,
    }


def _jamba(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    mamba = [f"blk.{layer}.ssm_in.weight" in file.tensors for layer in layers]
    experts = [f"blk.{layer}.ffn_gate_inp.weight" in file.tensors for layer in layers]
    count = get("expert_count") or 1
    return {
        "layers_block_type": ["mamba" if is_mamba else "attention" for is_mamba in mamba],
        "layers_num_experts": [count if mixture else 1 for mixture in experts],
        "num_experts": count,
        "num_experts_per_tok": get("expert_used_count") or 1,
        "mamba_expand": get("ssm.inner_size") // config["hidden_size"],
        "mamba_d_state": get("ssm.state_size"),
        "mamba_dt_rank": get("ssm.time_step_rank"),
        "mamba_d_conv": get("ssm.conv_kernel"),
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in file.tensors),
        "mamba_proj_bias": any(name.endswith("ssm_in.bias") for name in file.tensors),
    }


def _kimi_linear(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    layers, rope_dim = range(config["num_hidden_layers"]), get("rope.dimension_count")
    linear = [f"blk.{layer}.ssm_a" in file.tensors for layer in layers]
    return {
        "layer_types": ["linear_attention" if is_linear else "full_attention" for is_linear in linear],
        "linear_num_heads": math.prod(file.tensors[f"blk.{linear.index(True)}.ssm_a"].shape),
        "linear_head_dim": get("kda.head_dim"),
        "linear_conv_kernel_dim": get("ssm.conv_kernel"),
        "q_lora_rank": get("attention.q_lora_rank"),
        "kv_lora_rank": get("attention.kv_lora_rank"),
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": get("attention.key_length_mla") - rope_dim,
        "v_head_dim": get("attention.value_length_mla"),
        "model_max_length": config["max_position_embeddings"],
        "first_k_dense_replace": get("leading_dense_block_count", 1),
        "num_experts": get("expert_count"),
        "num_experts_per_token": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
        "num_shared_experts": get("expert_shared_count", 1),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "moe_renormalize": bool(get("expert_weights_norm", True)),
        "num_expert_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
        "partial_rotary_factor": None,
    }


def _mamba(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """Mamba, Falcon Mamba (which has norms of step sizes, B and C) and Mamba-2: one mixer a layer."""
    found = {
        "intermediate_size": get("ssm.inner_size"),
        "state_size": get("ssm.state_size"),
        "conv_kernel": get("ssm.conv_kernel"),
        "layer_norm_epsilon": config["rms_norm_eps"],
        "use_bias": "blk.0.ssm_in.bias" in file.tensors,
        "use_conv_bias": "blk.0.ssm_conv1d.bias" in file.tensors,
    }
    rank, groups = get("ssm.time_step_rank"), get("ssm.group_count")
    if config["architectures"] == ["Mamba2ForCausalLM"]:
        return found | {"num_heads": rank, "head_dim": get("ssm.inner_size") // rank, "n_groups": groups}
    normed = {"architectures": ["FalconMambaForCausalLM"]} if get("ssm.dt_b_c_rms") else {}
    return found | {"time_step_rank": rank} | normed


_READERS = {
    "lfm2moe": _lfm2_moe,
    "falcon-h1": _falcon_h1,
    "jamba": _jamba,
    "kimi-linear": _kimi_linear,
    "mamba": _mamba,
    "mamba2": _mamba,
    "qwen3next": _delta,
    "qwen35": _delta,
    "qwen35moe": _delta,
    "gemma3n": _gemma3n,
    "gemma4": _gemma4,
    "granitehybrid": _granite_hybrid,
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "lfm2": _lfm2,
}
