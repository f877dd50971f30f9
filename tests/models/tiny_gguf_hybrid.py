"""What llama.cpp's converter does to models whose layers differ: recurrent ones between attention, and Gemma 4's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import NormalDist

import numpy as np

ARCHITECTURES = {
    "Qwen3NextForCausalLM": "qwen3next",
    "Qwen3_5ForCausalLM": "qwen35",
    "Qwen3_5MoeForCausalLM": "qwen35moe",
    "Gemma3nForCausalLM": "gemma3n",
    "Gemma4ForCausalLM": "gemma4",
    "GraniteMoeHybridForCausalLM": "granitehybrid",
    "Lfm2ForCausalLM": "lfm2",
    "Lfm2MoeForCausalLM": "lfm2moe",
    "FalconH1ForCausalLM": "falcon-h1",
    "JambaForCausalLM": "jamba",
    "KimiLinearForCausalLM": "kimi-linear",
    "MambaForCausalLM": "mamba",
    "FalconMambaForCausalLM": "mamba",
    "Mamba2ForCausalLM": "mamba2",
    "NemotronHForCausalLM": "nemotron_h_moe",
}


def metadata(c: Mapping, arch: str) -> dict:
    """Keys below the architecture that only these have; of fields that others have too, those that differ."""
    if arch in ("qwen3next", "qwen35", "qwen35moe"):
        return {
            "ssm.conv_kernel": c["linear_conv_kernel_dim"],
            "ssm.state_size": c["linear_key_head_dim"],
            "ssm.group_count": c["linear_num_key_heads"],
            "ssm.time_step_rank": c["linear_num_value_heads"],
            "ssm.inner_size": c["linear_num_value_heads"] * c["linear_value_head_dim"],
            "full_attention_interval": 4,
            "rope.dimension_count": int(c["head_dim"] * c["rope_parameters"]["partial_rotary_factor"]),
        }
    if arch == "gemma3n":
        return {
            "attention.sliding_window": c["sliding_window"],
            "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in c["layer_types"]],
            "attention.shared_kv_layers": float(c["num_kv_shared_layers"]),
            "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
            "altup.num_inputs": c["altup_num_inputs"],
            "altup.active_idx": c["altup_active_idx"],
            "activation_sparsity_scale": [
                NormalDist().inv_cdf(share) if share else 0.0 for share in c["activation_sparsity_pattern"]
            ],
        }
    if arch == "gemma4":
        sliding = [kind == "sliding_attention" for kind in c["layer_types"]]
        own = own_of(c)
        shared, ffw = c["num_kv_shared_layers"], c["intermediate_size"]
        first = len(sliding) - shared
        kv = own.get("num_key_value_heads", c["num_key_value_heads"])
        return {
            "attention.shared_kv_layers": shared,
            "embedding_length_per_layer_input": c["hidden_size_per_layer_input"],
            "attention.sliding_window": c["sliding_window"],
            "attention.sliding_window_pattern": sliding,
            "attention.key_length": own["head_dim"],
            "attention.key_length_swa": c["head_dim"],
            "attention.head_count_kv": [c["num_key_value_heads"] if slides else kv for slides in sliding],
            "feed_forward_length": [
                ffw * (2 if c["use_double_wide_mlp"] and i >= first else 1) for i in range(len(sliding))
            ],
            "expert_used_count": c.get("top_k_experts"),
            "rope.dimension_count": own["head_dim"],
        }
    if arch == "granitehybrid":
        kv = [0 if kind == "linear_attention" else c["num_key_value_heads"] for kind in c["layer_types"]]
        return {
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.group_count": c["mamba_n_groups"],
            "ssm.time_step_rank": c["mamba_n_heads"],
            "ssm.inner_size": c["mamba_n_heads"] * c["mamba_d_head"],
            "attention.head_count_kv": kv,
            "expert_shared_feed_forward_length": c["shared_intermediate_size"],
            "rope.scaling.finetuned": c["position_embedding_type"] == "rope",
        }
    if arch == "lfm2":
        kv = [0 if kind == "conv" else c["num_key_value_heads"] for kind in c["layer_types"]]
        ffw = 2 * c["intermediate_size"] // 3
        ffw = -(-ffw // c["block_multiple_of"]) * c["block_multiple_of"]
        return {
            "shortconv.l_cache": c["conv_L_cache"],
            "attention.head_count_kv": kv,
            "feed_forward_length": ffw,
            "attention.layer_norm_rms_epsilon": c["norm_eps"],
        }
    if arch == "nemotron_h_moe":
        kinds = c["layers_block_type"]
        return {
            "block_count": len(kinds),
            "ssm.conv_kernel": c["conv_kernel"],
            "ssm.state_size": c["ssm_state_size"],
            "ssm.group_count": c["n_groups"],
            "ssm.time_step_rank": c["mamba_num_heads"],
            "ssm.inner_size": c["mamba_num_heads"] * c["mamba_head_dim"],
            "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"],
            "attention.head_count_kv": [c["num_key_value_heads"] if kind == "full_attention" else 0 for kind in kinds],
            "expert_shared_feed_forward_length": c["moe_shared_expert_intermediate_size"],
            "moe_latent_size": c.get("moe_latent_size"),
            "expert_weights_scale": float(c["routed_scaling_factor"]),
            "expert_weights_norm": c["norm_topk_prob"],
            "expert_group_count": c["n_group"],
            "expert_group_used_count": c["topk_group"],
        }
    return _recurrent_metadata(c, arch)


def _recurrent_metadata(c: Mapping, arch: str) -> dict:
    if arch == "lfm2moe":
        return {
            "shortconv.l_cache": c["conv_L_cache"],
            "attention.head_count_kv": [0 if kind == "conv" else c["num_key_value_heads"] for kind in c["layer_types"]],
            "attention.layer_norm_rms_epsilon": c["norm_eps"],
            "leading_dense_block_count": c["num_dense_layers"],
        }
    if arch == "falcon-h1":
        return {
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.group_count": c["mamba_n_groups"],
            "ssm.time_step_rank": c["mamba_n_heads"],
            "ssm.inner_size": c["mamba_d_ssm"],
        }
    if arch == "jamba":
        period, offset = c["attn_layer_period"], c["attn_layer_offset"]
        layers = range(c["num_hidden_layers"])
        return {
            "attention.head_count_kv": [c["num_key_value_heads"] if i % period == offset else 0 for i in layers],
            "ssm.conv_kernel": c["mamba_d_conv"],
            "ssm.state_size": c["mamba_d_state"],
            "ssm.time_step_rank": c["mamba_dt_rank"],
            "ssm.inner_size": c["mamba_expand"] * c["hidden_size"],
        }
    if arch == "kimi-linear":
        return {
            "attention.head_count_kv": [int(kind == "full_attention") for kind in c["layer_types"]],
            "ssm.conv_kernel": c["linear_conv_kernel_dim"],
            "kda.head_dim": c["linear_head_dim"],
            "attention.q_lora_rank": c["q_lora_rank"],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
            "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": c["qk_rope_head_dim"],
            "expert_count": c["num_experts"],
            "expert_used_count": c["num_experts_per_token"],
            "expert_shared_count": c["num_shared_experts"],
            "leading_dense_block_count": c["mlp_layer_types"].count("dense"),
            "expert_weights_scale": float(c["routed_scaling_factor"]),
            "expert_group_count": c["num_expert_group"],
            "expert_group_used_count": c["topk_group"],
        }
    if arch in ("mamba", "mamba2"):
        inner = c["intermediate_size"] if arch == "mamba" else c["num_heads"] * c["head_dim"]
        return {
            "context_length": 1 << 20,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.key_length": None,
            "attention.layer_norm_rms_epsilon": c["layer_norm_epsilon"],
            "attention.layer_norm_epsilon": None,
            "ssm.conv_kernel": c["conv_kernel"],
            "ssm.state_size": c["state_size"],
            "ssm.group_count": c.get("n_groups"),
            "ssm.time_step_rank": c["time_step_rank"] if arch == "mamba" else c["num_heads"],
            "ssm.inner_size": inner,
            "ssm.dt_b_c_rms": c["architectures"] == ["FalconMambaForCausalLM"] if arch == "mamba" else None,
        }
    return {}


def own_of(c: Mapping) -> dict:
    """What Gemma 4's layers that see all have of their own."""
    full = c["layer_types"].index("full_attention")
    return next(fields for index, fields in c["per_layer_config"].items() if int(index) == full)


def rope_tensors(c: Mapping, arch: str) -> dict:
    if arch != "gemma4":
        return {}
    own = own_of(c)
    half = own["head_dim"] // 2
    turning = int(half * c["rope_parameters"]["full_attention"]["partial_rotary_factor"])
    return {"rope_freqs.weight": [1.0] * turning + [1e30] * (half - turning)}


def special(name: str, array: np.ndarray, c: Mapping, arch: str) -> dict[str, np.ndarray] | None:
    """By the file's own names, what becomes of a tensor that the converter names or arranges in its own way."""
    if arch == "falcon-h1" and name in ("model.embed_tokens.weight", "lm_head.weight"):
        head = name.startswith("lm_head")
        factor = c["lm_head_multiplier" if head else "embedding_multiplier"]
        return {"output.weight" if head else "token_embd.weight": array * factor}
    layer = re.match(r"^(?:model|backbone)\.layers\.(\d+)\.(.+)$", name)
    if layer is None:
        return None
    block, part = f"blk.{layer[1]}", layer[2]
    if arch in ("qwen3next", "qwen35", "qwen35moe") and part.startswith("linear_attn."):
        return _delta(block, part.removeprefix("linear_attn."), array, c, arch)
    if arch == "gemma3n" and part == "altup.correct_output_scale":
        return {f"{block}.altup_correct_scale.weight": array}
    if arch == "gemma4":
        own = {
            "layer_scalar": "layer_output_scale.weight",
            "router.scale": "ffn_gate_inp.scale",
            "router.per_expert_scale": "ffn_down_exps.scale",
            "router.proj.weight": "ffn_gate_inp.weight",
            "experts.gate_up_proj": "ffn_gate_up_exps.weight",
            "experts.down_proj": "ffn_down_exps.weight",
        }.get(part)
        return None if own is None else {f"{block}.{own}": array}
    if arch == "falcon-h1" and (factor := _falcon_factor(part, c)) is not None:
        return {f"{block}.{FALCON[part]}": array * factor}
    if part.endswith(".A_log"):
        plain = arch in ("mamba", "jamba", "kimi-linear")
        return {f"{block}.ssm_a": -np.exp(array if plain else array[:, None])}
    if arch in ("mamba", "jamba") and part.endswith((".D", ".dt_bias")):
        return None
    if arch == "kimi-linear" and (dense := re.fullmatch(r"block_sparse_moe\.(gate|up|down)_proj\.weight", part)):
        return {f"{block}.ffn_{dense[1]}.weight": array}  # transformers saves dense blocks under the mixture's name
    if arch == "kimi-linear" and part.endswith("_conv1d.weight"):
        own = f"{block}.ssm_conv1d_{part.split('.')[1][0]}.weight"
        return {own: array.reshape(1, array.shape[0], 1, array.shape[-1])}
    if part in ("mamba.D", "mixer.D"):
        return {f"{block}.ssm_d": array[:, None]}
    if part.endswith(".dt_bias"):
        return {f"{block}.ssm_dt.bias": array}
    if part.endswith(".conv1d.weight"):
        return {f"{block}.ssm_conv1d.weight": array[:, 0]}
    if part in ("mamba.norm.weight", "mixer.norm.weight"):
        groups = c.get("mamba_n_groups") or c["n_groups"]
        return {f"{block}.ssm_norm.weight": array.reshape(groups, -1)}
    if part == "conv.conv.weight":
        return {f"{block}.shortconv.conv.weight": array[:, 0]}
    if part == "mixer.gate.e_score_correction_bias":
        return {f"{block}.exp_probs_b.bias": array}
    if part.startswith("shared_mlp."):
        ending = "_shexp" if c["num_local_experts"] else ""
        if part.startswith("shared_mlp.output"):
            return {f"{block}.ffn_down{ending}.weight": array}
        gate, up = np.split(array, 2)
        return {f"{block}.ffn_gate{ending}.weight": gate, f"{block}.ffn_up{ending}.weight": up}
    return None


FALCON = {f"self_attn.{part}_proj.weight": f"attn_{part}.weight" for part in "qkv"} | {
    "self_attn.o_proj.weight": "attn_output.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
    "mamba.in_proj.weight": "ssm_in.weight",
    "mamba.out_proj.weight": "ssm_out.weight",
}


def _falcon_factor(part: str, c: Mapping) -> np.ndarray | float | None:
    """What the converter multiplies a tensor of Falcon-H1 with."""
    of_inputs = c["attention_in_multiplier"]
    if part == "mamba.in_proj.weight":
        inner, states = c["mamba_d_ssm"], c["mamba_n_groups"] * c["mamba_d_state"]
        rows = np.repeat(c["ssm_multipliers"], (inner, inner, states, states, c["mamba_n_heads"]))
        return c["ssm_in_multiplier"] * rows[:, None]
    return {
        "self_attn.q_proj.weight": of_inputs,
        "self_attn.k_proj.weight": of_inputs * c["key_multiplier"],
        "self_attn.v_proj.weight": of_inputs,
        "self_attn.o_proj.weight": c["attention_out_multiplier"],
        "feed_forward.gate_proj.weight": c["mlp_multipliers"][0],
        "feed_forward.down_proj.weight": c["mlp_multipliers"][1],
        "mamba.out_proj.weight": c["ssm_out_multiplier"],
    }.get(part)


def _delta(block: str, part: str, array: np.ndarray, c: Mapping, arch: str) -> dict[str, np.ndarray]:
    K, H = c["linear_num_key_heads"], c["linear_num_value_heads"]
    n, p = c["linear_key_head_dim"], c["linear_value_head_dim"]
    G = H // K

    def turns(values: np.ndarray, axis: int = 0) -> np.ndarray:
        """Value heads in turns: the first of each key head, then the second ones; Qwen3-Next's stay as they are."""
        if arch == "qwen3next":
            return values
        shape = values.shape
        cut = values.reshape(*shape[:axis], K, G, -1, *shape[axis + 1 :])
        return cut.swapaxes(axis, axis + 1).reshape(shape)

    if part == "in_proj_qkvz.weight":
        q, k, v, z = np.split(array.reshape(K, -1, array.shape[1]), [n, 2 * n, 2 * n + G * p], axis=1)
        q, k, v, z = (x.reshape(-1, array.shape[1]) for x in (q, k, v, z))
        return {f"{block}.attn_qkv.weight": np.concatenate([q, k, v]), f"{block}.attn_gate.weight": z}
    simple = {
        "in_proj_ba.weight": ("ssm_ba.weight", array),
        "in_proj_qkv.weight": ("attn_qkv.weight", array),
        "in_proj_z.weight": ("attn_gate.weight", turns(array)),
        "in_proj_b.weight": ("ssm_beta.weight", turns(array)),
        "in_proj_a.weight": ("ssm_alpha.weight", turns(array)),
        "A_log": ("ssm_a", -np.exp(turns(array))),
        "dt_bias": ("ssm_dt.bias", turns(array)),
        "norm.weight": ("ssm_norm.weight", array),
        "out_proj.weight": ("ssm_out.weight", turns(array, 1) if array.ndim == 2 else array),
        "conv1d.weight": ("ssm_conv1d.weight", array),
    }
    own, made = simple[part]
    if part in ("in_proj_qkv.weight", "conv1d.weight"):
        made = array[:, 0] if part.startswith("conv") else array
        made = np.concatenate([made[: 2 * K * n], turns(made[2 * K * n :])])
    return {f"{block}.{own}": made}
