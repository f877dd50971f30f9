"""Tiny random models of every architecture, made by transformers: the checkpoint, and what it should compute."""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.tiny_base import BASE, PROMPTS, STEPS, Tiny
from tests.models.tiny_hybrid import HYBRID

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
            "vision_config": {
                "model_type": "pixtral",
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "head_dim": 16,
                "image_size": 28,
            },
            "image_token_index": 10,
        },
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

TINY |= HYBRID


def make_reference(name: str, directory: Path) -> None:
    """Saves the random model as safetensors, and its greedy tokens and logits as `reference.npz`."""
    import torch
    import transformers

    tiny = TINY[name]
    fields = {key: value for key, value in (BASE | dict(tiny.fields)).items() if value is not None or key not in BASE}
    config = getattr(transformers, tiny.config)(**fields)
    torch.manual_seed(sum(name.encode()))
    model = getattr(transformers, tiny.model)(config).eval().float()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # As large as trained weights: at transformers' 0.02 a layer of this width would hardly matter.
            if parameter.dim() > 1:
                parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
            elif parameter_name.endswith("A_log"):  # states that last
                parameter.normal_(-2.0, 1.0)
            elif "norm" in parameter_name or "ln_" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(directory)
    vocab = config.get_text_config().vocab_size
    rng = np.random.default_rng(len(name))
    arrays: dict[str, np.ndarray] = {}
    kept = "past_key_values" if "past_key_values" in inspect.signature(model.forward).parameters else "cache_params"
    for index, length in enumerate(PROMPTS):
        tokens = rng.integers(3, vocab, length).tolist()
        with torch.no_grad():
            cache: Any = None
            pending = tokens
            for _ in range(STEPS):
                if tiny.cached:
                    out = model(torch.tensor([pending]), use_cache=True, **{kept: cache})
                    cache = getattr(out, kept)
                else:
                    out = model(torch.tensor([tokens]), use_cache=False)
                pending = [int(out.logits[0, -1].argmax())]
                tokens = tokens + pending
            arrays[f"logits{index}"] = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0].float().numpy()
        arrays[f"tokens{index}"] = np.array(tokens)
    np.savez(directory / "reference.npz", **arrays)


def compare(directory: Path, mesh: str | None = None, steps: int = STEPS, path: Path | None = None) -> dict[str, float]:
    """Runs the checkpoint (or the one at `path`) through our loader and pages; how far it is from the reference.

    Returns:
        `error`: the largest difference of logits over the largest logit. `tokens`: the fraction of greedy tokens that
        are the reference's.
    """
    import jax.numpy as jnp

    from models.loading.load import load_model, resolve
    from sharding.mesh import make_mesh
    from tests.models.paged import PagedModel

    devices = None if mesh is None else make_mesh(mesh)
    loaded = load_model(
        resolve(str(path or directory)), dtype=jnp.float32, mesh=devices, max_model_len=160, progress=False
    )
    reference = np.load(directory / "reference.npz")
    prompts = [reference[f"tokens{i}"][:length].tolist() for i, length in enumerate(PROMPTS)]
    results = PagedModel(loaded.model, mesh=devices).generate(prompts, steps)
    error, same = 0.0, []
    for index, (tokens, logits) in enumerate(results):
        wanted = reference[f"logits{index}"][: len(logits)]
        # Positions whose context is the reference's: all of them, while greedy tokens agree.
        agree = np.array(tokens) == reference[f"tokens{index}"][: len(tokens)]
        upto = len(wanted) if agree.all() else int(np.argmin(agree))
        error = max(error, float(np.abs(logits - wanted)[:upto].max() / np.abs(wanted).max()))
        same.append(agree[len(prompts[index]) :].mean())
    return {"error": error, "tokens": float(np.mean(same))}


def slug(name: str) -> str:
    """A folder's name: another one when the variant is defined anew, since folders may outlive a run."""
    digest = hashlib.sha256(repr((BASE, TINY[name], PROMPTS, STEPS)).encode()).hexdigest()[:8]
    return f"{name.replace(',', '').replace(' ', '-')}-{digest}"


def main(root: str, mesh: str, names: list[str]) -> None:
    """Compares checkpoints made before, on a mesh of CPU devices; prints one JSON object a line."""
    import math

    import jax

    jax.config.update("jax_num_cpu_devices", math.prod(int(part.split("=")[1]) for part in mesh.split(",")))
    for name in names:
        print(json.dumps({"name": name} | compare(Path(root) / slug(name), mesh, steps=8)), flush=True)


if __name__ == "__main__":
    import sys

    main(sys.argv[1], sys.argv[2], sys.argv[3:])
