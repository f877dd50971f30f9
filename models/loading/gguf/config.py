"""From GGUF metadata to the equivalent `config.json` dictionary, so that each family reads one format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from models.embedding_head import Dense
from models.loading.gguf import config_hybrid
from models.loading.gguf.file import GGUFFile

INTERLEAVED = ("llama", "granite", "granitemoe", "granitehybrid", "smollm3", "mistral3", "arcee")
"""Architectures whose GGUF converter permutes the rows of q and k for interleaved rotary pairs."""

SECTIONED = ("qwen2vl", "qwen3vl", "qwen3vlmoe", "qwen35", "qwen35moe")
"""Architectures whose positions may be three numbers, where images are read."""


def config_dict(file: GGUFFile, architecture: str) -> dict[str, Any]:
    """The `config.json` dictionary that says the same as the file's metadata.

    Args:
        architecture: the `architectures` entry of the family that the file belongs to.
    Raises:
        ValueError: the metadata lacks a field.
    """
    metadata, arch = file.metadata, file.metadata["general.architecture"]

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        return _settled(value) if isinstance(value, np.ndarray) else value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise ValueError(f"{file.path}: the metadata has no {arch}.{key}.")
        return value

    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise ValueError(f"{file.path} has no tensor 'token_embd.weight': it holds no language model.")
    heads = _largest(need("attention.head_count"))
    config = {
        "architectures": [architecture],
        "vocab_size": table.shape[0],
        "num_hidden_layers": need("block_count"),
        "hidden_size": need("embedding_length"),
        "intermediate_size": _largest(get("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": _largest(get("attention.head_count_kv", heads)),
        "head_dim": get("attention.key_length"),
        "max_position_embeddings": get("context_length", 2048),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "layer_norm_eps": get("attention.layer_norm_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "sliding_window": get("attention.sliding_window"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": any(f"blk.0.{part}.bias" in file.tensors for part in ("attn_q", "attn_q_a", "attn_kv_a_mqa")),
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
    }
    rotary = get("rope.dimension_count")
    head_dim = config["head_dim"] or config["hidden_size"] // max(heads, 1)  # models without attention say 0
    if rotary and rotary != head_dim:
        config["partial_rotary_factor"] = rotary / head_dim
    pattern = metadata.get(f"{arch}.attention.sliding_window_pattern")
    if config["sliding_window"] and pattern is not None:
        config["layer_types"] = _layer_types(pattern, config["num_hidden_layers"])
    drafts = get("nextn_predict_layers") or 0  # layers behind the last one that predict further tokens
    config["num_hidden_layers"] -= drafts
    config["num_nextn_predict_layers"] = drafts or None
    config["rope_scaling"] = _rope_scaling(file, arch, get)
    if arch in SECTIONED and (sections := metadata.get(f"{arch}.rope.dimension_sections")) is not None:
        own = {"mrope_section": [int(n) for n in sections][:3], "mrope_interleaved": arch.startswith("qwen3")}
        config["rope_scaling"] = (config["rope_scaling"] or {}) | own
    if arch in ("bert", "nomic-bert"):
        for field, tensor in (("type_vocab_size", "token_types"), ("max_position_embeddings", "position_embd")):
            if f"{tensor}.weight" in file.tensors:
                config[field] = file.tensors[f"{tensor}.weight"].shape[0]
    config |= _of_family(arch, config, get, file) | config_hybrid.of_family(arch, config, get, file)
    return {name: value for name, value in config.items() if value is not None}


def _of_family(arch: str, config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """What only some architectures have, under the names of their config.json.

    Where the metadata does not say a number, it is the one that llama.cpp computes with for that architecture.
    """
    if arch in ("gemma2", "gemma3", "gemma-embedding"):
        heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
        # The 27B models (46 and 62 layers) scale scores by the width a head has of the embedding.
        is_27b = layers == {"gemma2": 46, "gemma3": 62}.get(arch)
        return {
            "query_pre_attn_scalar": config["hidden_size"] // heads if is_27b else config["head_dim"],
            "attn_logit_softcapping": get("attn_logit_softcapping"),
            "final_logit_softcapping": get("final_logit_softcapping"),
            "rope_local_base_freq": get("rope.freq_base_swa"),
            "attention_bias": False,
            "use_bidirectional_attention": arch == "gemma-embedding",
        }
    if arch == "modern-bert":
        return _modern_bert(config, get, file)
    if arch in ("granite", "granitemoe"):
        return {
            **(_experts(get) if arch == "granitemoe" else {}),
            "attention_multiplier": get("attention.scale"),
            "embedding_multiplier": get("embedding_scale"),
            "residual_multiplier": get("residual_scale"),
            "logits_scaling": get("logit_scale"),
        }
    if arch == "gpt-oss":
        return _experts(get) | {"attention_bias": True}
    if arch == "glm4moe":
        return _sigmoid_experts(get) | {
            "use_qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
            "partial_rotary_factor": config.get("partial_rotary_factor", 1.0),
        }
    if arch == "minimax-m2":
        return _experts(get) | {"intermediate_size": get("expert_feed_forward_length")}
    if arch in ("deepseek2", "glm-dsa", "mistral4"):
        return _latent(arch, config, get, file)
    if arch == "llama4":
        return _experts(get) | {
            "intermediate_size": get("expert_feed_forward_length"),
            "intermediate_size_mlp": get("feed_forward_length"),
            "interleave_moe_layer_step": get("interleave_moe_layer_step", 1),
            "use_qk_norm": get("expert_count") != 128,  # Maverick's 128 experts go without
            "attention_chunk_size": 8192,
        }
    if arch == "cohere2":
        return {"logit_scale": get("logit_scale")}
    if arch == "gpt2":
        return {"intermediate_size": get("feed_forward_length")}
    if arch == "starcoder2":
        return {"use_bias": True}
    if arch in (
        "qwen2", "qwen3", "qwen2vl", "qwen3vl", "qwen2moe", "qwen3moe", "qwen3vlmoe", "smollm3", "llama", "phi3", "olmo2", "olmoe"
    ):  # fmt: skip
        more: dict[str, Any] = {}
        if arch in ("qwen2", "qwen2vl", "qwen2moe", "olmo2", "olmoe", "phi3"):
            more["attention_bias"] = arch.startswith("qwen2")
        if get("expert_count"):
            more |= _experts(get) | {
                "num_experts": get("expert_count"),
                "shared_expert_intermediate_size": get("expert_shared_feed_forward_length"),
                "norm_topk_prob": bool(get("expert_weights_norm", arch in ("qwen3moe", "qwen3vlmoe"))),
            }
        return more
    return {}


def _layer_types(pattern: Any, num_layers: int) -> list[str]:
    """Which layers have the window: one truth value each, or a number n of which every n-th has none."""
    if np.ndim(pattern) == 0:
        every = int(pattern)
        sliding = [every == 0 or layer % every < every - 1 for layer in range(num_layers)]
    else:
        sliding = [bool(value) for value in pattern]
    return ["sliding_attention" if slides else "full_attention" for slides in sliding]


def _modern_bert(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """Every n-th layer, from the first on, sees the whole text."""
    return {
        "sliding_window": None,
        "layer_types": None,
        "local_attention": get("attention.sliding_window", 128),
        "global_attn_every_n_layers": get("attention.sliding_window_pattern", 3),
        "global_rope_theta": config["rope_theta"],
        "local_rope_theta": get("rope.freq_base_swa", 1e4),
        "norm_eps": config["layer_norm_eps"],
        "norm_bias": "output_norm.bias" in file.tensors,
        "attention_bias": "blk.0.attn_qkv.bias" in file.tensors,
    }


def _latent(arch: str, config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """DeepSeek's latent attention and mixtures."""
    rope_dim = get("rope.dimension_count")
    kv_rank = get("attention.kv_lora_rank")
    # Files for latent attention say what a page keeps in key_length, and a head's size in key_length_mla.
    head = get("attention.key_length_mla") or get("attention.key_length")
    return (
        _experts(get)
        | {
            "partial_rotary_factor": None,
            "head_dim": None,
            "n_routed_experts": get("expert_count"),
            "n_shared_experts": get("expert_shared_count"),
            "first_k_dense_replace": get("leading_dense_block_count", 0),
            "routed_scaling_factor": get("expert_weights_scale", 1.0),
            "norm_topk_prob": bool(get("expert_weights_norm", False)),
            "n_group": get("expert_group_count", 1),
            "topk_group": get("expert_group_used_count", 1),
            "topk_method": "group_limited_greedy" if get("expert_group_count", 1) > 1 else "greedy",
            "q_lora_rank": get("attention.q_lora_rank"),
            "kv_lora_rank": kv_rank,
            "qk_rope_head_dim": rope_dim,
            "qk_nope_head_dim": head - rope_dim,
            "v_head_dim": get("attention.value_length_mla") or get("attention.value_length"),
        }
        | (_indexer(config, get, file) if arch == "glm-dsa" else {})
    )


def _indexer(config: Mapping[str, Any], get: Any, file: GGUFFile) -> dict[str, Any]:
    """Of sparse attention; which layers have an indexer is what the tensors say."""
    has = [f"blk.{layer}.indexer.attn_k.weight" in file.tensors for layer in range(config["num_hidden_layers"])]
    return {
        "index_n_heads": get("attention.indexer.head_count"),
        "index_head_dim": get("attention.indexer.key_length"),
        "index_topk": get("attention.indexer.top_k"),
        "indexer_types": ["full" if chooses else "shared" for chooses in has],
    }


def _sigmoid_experts(get: Any) -> dict[str, Any]:
    """GLM-4.5's, in the names of DeepSeek-V3."""
    return _experts(get) | {
        "n_routed_experts": get("expert_count"),
        "n_shared_experts": get("expert_shared_count"),
        "first_k_dense_replace": get("leading_dense_block_count", 0),
        "routed_scaling_factor": get("expert_weights_scale", 1.0),
        "norm_topk_prob": bool(get("expert_weights_norm", True)),
        "n_group": get("expert_group_count", 1),
        "topk_group": get("expert_group_used_count", 1),
    }


def _experts(get: Any) -> dict[str, Any]:
    return {
        "num_local_experts": get("expert_count"),
        "num_experts_per_tok": get("expert_used_count"),
        "moe_intermediate_size": get("expert_feed_forward_length"),
    }


def family_name(metadata: Mapping[str, Any]) -> str:
    """The architecture that the registry is asked for: GGUF has one name for Llama, Mistral and Mixtral, for OLMo 2 and 3, and
    for DeepSeek-V2 and V3."""
    arch = metadata["general.architecture"]
    if arch == "olmo2" and metadata.get("olmo2.attention.sliding_window"):
        return "olmo2 with windows"
    if arch == "llama" and metadata.get("llama.attention.sliding_window") and not metadata.get("llama.expert_count"):
        return "llama with windows"
    if arch == "llama" and metadata.get("llama.expert_count"):
        return "llama with experts"
    if arch == "deepseek2" and metadata.get("deepseek2.expert_gating_func") == 2:
        return "deepseek2 with sigmoid routing"
    return arch


def pooling(metadata: Mapping[str, Any]) -> str | None:
    """How the file's authors make embeddings; None where they do not say."""
    kind = metadata.get(f"{metadata['general.architecture']}.pooling_type")
    return None if kind is None else {1: "mean", 2: "cls", 3: "last"}.get(int(kind))


def dense_steps(file: GGUFFile) -> tuple[Dense, ...]:
    """The matrices behind pooling that files of sentence-transformers models bring along, in their order."""
    named = ("dense_2.weight", "dense_3.weight")
    return tuple(Dense(file.read(n).astype(np.float32), None, "Identity") for n in named if n in file.tensors)


def rotated_pairs(config: Mapping[str, Any], arch: str) -> tuple[int, int] | None:
    """(query heads, key heads) whose rows the converter permuted, or None."""
    if arch not in INTERLEAVED:
        return None
    return config["num_attention_heads"], config["num_key_value_heads"]


def generation_defaults(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What `generation_config.json` would say: token ids that begin and end, and sampling defaults."""
    eos = [
        int(metadata[f"tokenizer.ggml.{name}_token_id"])
        for name in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{name}_token_id" in metadata
    ]
    defaults: dict[str, Any] = {}
    if eos:
        defaults["eos_token_id"] = eos[0] if len(eos) == 1 else list(dict.fromkeys(eos))
    if "tokenizer.ggml.bos_token_id" in metadata:
        defaults["bos_token_id"] = int(metadata["tokenizer.ggml.bos_token_id"])
    for ours, theirs in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p"), ("min_p", "min_p")):
        value = metadata.get(f"general.sampling.{theirs}")
        if value is not None:
            defaults[ours] = value
    return defaults


def _largest(value: Any) -> Any:
    """Of numbers that differ by layer the largest: layers without the thing have 0."""
    return max(value) if isinstance(value, list) else value


def _settled(values: np.ndarray) -> Any:
    """A per-layer array as one number where all layers agree."""
    unique = np.unique(values)
    return unique[0].item() if unique.size == 1 else values.tolist()


def _rope_scaling(file: GGUFFile, arch: str, get: Any) -> dict[str, Any] | None:
    for name in ("rope_freqs.weight", "rope_factors_long.weight"):
        if name in file.tensors:
            long = file.read(name).astype(np.float32).tolist()
            short = "rope_factors_short.weight"
            scaling: dict[str, Any] = {
                "rope_type": "longrope",
                "long_factor": long,
                "short_factor": file.read(short).astype(np.float32).tolist() if short in file.tensors else long,
            }
            original = get("rope.scaling.original_context_length")
            if original:
                scaling["original_max_position_embeddings"] = original
            # Llama 3.1's divisors come without a factor on cos and sin; Phi's with one, which the file states.
            scaling["attention_factor"] = get("rope.scaling.attn_factor", 1.0)
            return scaling
    kind = get("rope.scaling.type")
    factor = get("rope.scaling.factor")
    if kind in (None, "none") or not factor:
        return None
    scaling = {"rope_type": kind, "factor": factor}
    original = get("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    if kind == "linear":
        # The context that files state is the stretched one.
        scaling.setdefault("original_max_position_embeddings", max(1, int(get("context_length", 2048) / factor)))
    if kind == "yarn":
        scaling["attention_factor"] = get("rope.scaling.yarn_attn_factor")
        scaling["beta_fast"] = get("rope.scaling.yarn_beta_fast")
        scaling["beta_slow"] = get("rope.scaling.yarn_beta_slow")
        scaling["truncate"] = get("rope.scaling.yarn_truncate", False if arch == "gpt-oss" else None)
        log_multiplier = get("rope.scaling.yarn_log_multiplier")
        if log_multiplier:  # 0.1 * mscale_all_dim; mscale is the same in every published model
            scaling["mscale"] = scaling["mscale_all_dim"] = 10.0 * log_multiplier
    if arch in ("mistral3", "mistral4"):
        scaling["llama_4_scaling_beta"] = get("attention.temperature_scale")
    return {name: value for name, value in scaling.items() if value is not None}
