"""Writes a tiny Hugging Face checkpoint as GGUF, as llama.cpp's converter does: names, permutations, metadata."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from models.loading.gguf.checkpoint import table_names
from tests.models import tiny_gguf_hybrid

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MinistralForCausalLM": "llama",
    "Ministral3ForCausalLM": "mistral3",
    "MixtralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "GraniteForCausalLM": "granite",
    "GraniteMoeForCausalLM": "granitemoe",
    "Olmo2ForCausalLM": "olmo2",
    "Olmo3ForCausalLM": "olmo2",
    "OlmoeForCausalLM": "olmoe",
    "Phi3ForCausalLM": "phi3",
    "SmolLM3ForCausalLM": "smollm3",
    "SeedOssForCausalLM": "seed_oss",
    "Cohere2ForCausalLM": "cohere2",
    "Exaone4ForCausalLM": "exaone4",
    "Starcoder2ForCausalLM": "starcoder2",
    "GPT2LMHeadModel": "gpt2",
    "GptOssForCausalLM": "gpt-oss",
    "Llama4ForCausalLM": "llama4",
    "DeepseekV2ForCausalLM": "deepseek2",
    "DeepseekV3ForCausalLM": "deepseek2",
    "Glm4MoeLiteForCausalLM": "deepseek2",
    "GlmMoeDsaForCausalLM": "glm-dsa",
    "Glm4MoeForCausalLM": "glm4moe",
    "MiniMaxM2ForCausalLM": "minimax-m2",
    "Mistral4ForCausalLM": "mistral4",
} | tiny_gguf_hybrid.ARCHITECTURES
PERMUTED = ("llama", "mistral3", "granite", "granitemoe", "granitehybrid", "smollm3")

ONE_MORE = ("gemma", "gemma2", "gemma3", "qwen3next", "qwen35", "qwen35moe")
"""Architectures whose norms' scales the converter stores whole."""


def to_gguf(directory: Path, path: Path) -> None:
    """Converts `directory`, writing matrices in float32."""
    config = json.loads((directory / "config.json").read_text())
    arch = ARCHITECTURES[config["architectures"][0]]
    layers = config.get("num_hidden_layers") or config.get("n_layer") or len(config["layers_block_type"])
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata(config, arch) | tiny_gguf_hybrid.metadata(config, arch)).items():
        if value is not None:
            add = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                float: writer.add_float32,
                str: writer.add_string,
                list: writer.add_array,
            }
            add[type(value)](f"{arch}.{key}", value)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    tensors = dict(load_file(directory / "model.safetensors"))
    for name in list(tensors):
        for own, array in (tiny_gguf_hybrid.special(name, tensors[name], config, arch) or {}).items():
            tensors.pop(name, None)
            writer.add_tensor(own, np.ascontiguousarray(array, np.float32))
    for name, array in tensors_of(tensors, config, arch).items():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            own = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
        elif name.endswith(".sinks"):
            own = f"blk.{name.split('.')[2]}.attn_sinks.weight"
        else:
            known = re.sub(r"^backbone(.*)\.mixer\.experts\.", r"model\1.mlp.experts.", name)
            own = next(table_names(table, known), None)
        assert own is not None, name
        writer.add_tensor(own, np.ascontiguousarray(array, np.float32))
    for name, array in (rope_tensors(config) | tiny_gguf_hybrid.rope_tensors(config, arch)).items():
        writer.add_tensor(name, np.asarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def metadata(c: dict, arch: str) -> dict:
    heads = c.get("num_attention_heads") or c.get("n_head", 1)
    rope = c.get("rope_parameters") or {}
    width = c.get("hidden_size") or c["n_embd"]
    head = c.get("head_dim") or width // heads
    keys = {
        "block_count": c.get("num_hidden_layers") or c.get("n_layer"),
        "context_length": c.get("n_positions") or c.get("model_max_length") or c.get("max_position_embeddings"),
        "embedding_length": width,
        "feed_forward_length": c.get("intermediate_size") or 4 * width,
        "attention.head_count": heads,
        "attention.head_count_kv": c.get("num_key_value_heads"),
        "attention.key_length": head if "head_dim" in c else None,
        "attention.layer_norm_rms_epsilon": c.get("rms_norm_eps"),
        "attention.layer_norm_epsilon": c.get("norm_epsilon", c.get("layer_norm_epsilon", c.get("layer_norm_eps"))),
        "attention.sliding_window": c.get("sliding_window")
        if arch in ("llama", "gemma2", "gemma3", "phi3", "starcoder2", "gpt-oss", "olmo2", "exaone4", "cohere2")
        else None,
        "rope.freq_base": rope.get("rope_theta"),
        "attn_logit_softcapping": c.get("attn_logit_softcapping"),
        "final_logit_softcapping": c.get("final_logit_softcapping"),
        "attention.scale": c.get("attention_multiplier"),
        "embedding_scale": c.get("embedding_multiplier"),
        "residual_scale": c.get("residual_multiplier"),
        "logit_scale": c.get("logits_scaling") or c.get("logit_scale"),
        "expert_count": c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts"),
        "expert_used_count": c.get("num_experts_per_tok"),
        "expert_feed_forward_length": c.get("moe_intermediate_size"),
        "expert_shared_feed_forward_length": c.get("shared_expert_intermediate_size"),
    }
    if "full_attention" in rope:
        keys["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        keys["rope.freq_base"] = rope["rope_theta"]
    if arch in ("llama", "olmo2", "exaone4") and c.get("layer_types"):
        keys["attention.sliding_window_pattern"] = [kind == "sliding_attention" for kind in c["layer_types"]]
    if arch == "llama4":
        keys["feed_forward_length"] = c["intermediate_size_mlp"]
        keys["expert_feed_forward_length"] = c["intermediate_size"]
        keys["interleave_moe_layer_step"] = c["interleave_moe_layer_step"]
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        keys["rope.dimension_count"] = int(head * rope["partial_rotary_factor"])
    if rope.get("rope_type") in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
        keys["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
        if rope.get("mscale_all_dim"):
            keys["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"] * (1.0 if arch == "mistral3" else 0.1)
    if rope.get("llama_4_scaling_beta"):
        keys["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
    if rope.get("rope_type") == "longrope":
        original = rope["original_max_position_embeddings"]
        keys["rope.scaling.original_context_length"] = original
        stretch = c["max_position_embeddings"] / original
        keys["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(stretch) / math.log(original))
    if arch == "glm4moe":
        keys |= routing(c) | {"rope.dimension_count": int(head * rope["partial_rotary_factor"])}
    if arch == "minimax-m2":
        keys["expert_feed_forward_length"] = c["intermediate_size"]
    if arch == "glm-dsa":
        keys |= {
            "attention.indexer.head_count": c["index_n_heads"],
            "attention.indexer.key_length": c["index_head_dim"],
            "attention.indexer.top_k": c["index_topk"],
        }
    if arch in ("deepseek2", "glm-dsa", "mistral4"):
        keys |= routing(c) | {
            "attention.q_lora_rank": c["q_lora_rank"],
            "attention.kv_lora_rank": c["kv_lora_rank"],
            "attention.head_count_kv": 1,
            "attention.key_length": c["kv_lora_rank"] + c["qk_rope_head_dim"],
            "attention.value_length": c["kv_lora_rank"],
            "attention.key_length_mla": c["qk_nope_head_dim"] + c["qk_rope_head_dim"],
            "attention.value_length_mla": c["v_head_dim"],
            "rope.dimension_count": c["qk_rope_head_dim"],
        }
    return keys


def routing(c: dict) -> dict:
    """Of mixtures of DeepSeek's kind."""
    kinds = c.get("mlp_layer_types")
    return {
        "expert_count": c.get("n_routed_experts") or c.get("num_local_experts"),
        "expert_shared_count": c["n_shared_experts"],
        "leading_dense_block_count": kinds.count("dense") if kinds else c["first_k_dense_replace"],
        "expert_weights_scale": float(c["routed_scaling_factor"]),
        "expert_weights_norm": bool(c.get("norm_topk_prob", False)),
        "expert_gating_func": 1 if "V2" in c["architectures"][0] or "Mistral4" in c["architectures"][0] else 2,
        "expert_group_count": c["n_group"],
        "expert_group_used_count": c["topk_group"],
    }


def rope_tensors(c: dict) -> dict:
    rope = c.get("rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{name}.weight": rope[f"{name}_factor"] for name in ("long", "short")}
    if rope.get("rope_type") == "llama3":
        head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        inverse = rope["rope_theta"] ** -(np.arange(0, head, 2) / head)
        wavelength, original = 2 * np.pi / inverse, rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (original / wavelength - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        kept = np.where(wavelength < original / high, 1.0, between)
        return {"rope_freqs.weight": np.where(wavelength > original / low, rope["factor"], kept)}
    return {}


def tensors_of(tensors: dict, c: dict, arch: str) -> dict:
    """The arrays as GGUF has them, still by Hugging Face's names."""
    out: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in tensors.items():
        if arch in PERMUTED and (".q_proj." in name or ".k_proj." in name):
            heads = c["num_attention_heads"] if ".q_proj." in name else c["num_key_value_heads"]
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        if arch in ONE_MORE and name.endswith("norm.weight"):
            array = array + 1
        if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            array = array.T
        if ".experts." in name and arch == "gpt-oss":
            suffix = "bias" if name.endswith("_bias") else "weight"
            base = name.split(".experts.")[0] + ".experts."
            array = array if suffix == "bias" else array.swapaxes(1, 2)
            if "gate_up" in name:
                out[f"{base}gate_proj.{suffix}"], out[f"{base}up_proj.{suffix}"] = array[:, ::2], array[:, 1::2]
            else:
                out[f"{base}down_proj.{suffix}"] = array
        elif ".experts." in name and arch == "mistral4":  # gates and ups stay together
            out[f"{name}.weight"] = array
        elif ".experts." in name and arch == "llama4":
            base, turned = name.split(".experts.")[0] + ".experts.", array.swapaxes(1, 2)
            if "gate_up" in name:
                out[f"{base}gate_proj.weight"], out[f"{base}up_proj.weight"] = np.split(turned, 2, axis=1)
            else:
                out[f"{base}down_proj.weight"] = turned
        elif name.endswith(".input_linear.weight"):
            base = name.split(".input_linear.")[0]
            gate, up = np.split(array, 2, axis=1)
            out[f"{base}.experts.w1.weight"], out[f"{base}.experts.w3.weight"] = gate, up
        elif stacked := re.match(r"^(model\.altup\w*_projections)\.(\d+)(\.weight)$", name):
            stacks.setdefault(stacked[1] + stacked[3], {})[int(stacked[2])] = array
        elif ".experts." in name:
            before, after = name.split(".experts.")
            index, part = after.split(".", 1)
            stacks.setdefault(f"{before}.experts.{part}", {})[int(index)] = array
        elif name.endswith("kv_b_proj.weight"):
            heads, nope = c["num_attention_heads"], c["qk_nope_head_dim"]
            both = array.reshape(heads, -1, array.shape[1])
            out[name.replace("kv_b_proj", "k_b_proj")] = both[:, :nope].swapaxes(1, 2)
            out[name.replace("kv_b_proj", "v_b_proj")] = both[:, nope:]
        else:
            out[name] = array
    return out | {name: np.stack([arrays[i] for i in range(len(arrays))]) for name, arrays in stacks.items()}
