"""Mistral's own layout: `params.json` beside `consolidated.safetensors`, with other names, and q and k in neighbouring pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_NAMES = (
    (re.compile(r"^tok_embeddings\."), "model.embed_tokens."),
    (re.compile(r"^norm\."), "model.norm."),
    (re.compile(r"^output\."), "lm_head."),
    (re.compile(r"^layers\.(\d+)\.attention_norm\."), r"model.layers.\1.input_layernorm."),
    (re.compile(r"^layers\.(\d+)\.ffn_norm\."), r"model.layers.\1.post_attention_layernorm."),
    (re.compile(r"^layers\.(\d+)\.attention\.w([qkvo])\."), r"model.layers.\1.self_attn.\2_proj."),
    (re.compile(r"^layers\.(\d+)\.feed_forward\.w1\."), r"model.layers.\1.mlp.gate_proj."),
    (re.compile(r"^layers\.(\d+)\.feed_forward\.w2\."), r"model.layers.\1.mlp.down_proj."),
    (re.compile(r"^layers\.(\d+)\.feed_forward\.w3\."), r"model.layers.\1.mlp.up_proj."),
    (
        re.compile(r"^layers\.(\d+)\.(?:feed_forward|block_sparse_moe)\.(gate|experts)\."),
        r"model.layers.\1.block_sparse_moe.\2.",
    ),
    (re.compile(r"\.qscale_weight$"), ".weight_scale"),
    (re.compile(r"\.qscale_act$"), ".input_scale"),
)
_FIELDS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "vocab_size": "vocab_size",
    "rope_theta": "rope_theta",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
}
_CONTEXT = 128_000  # tokens, where the file does not say


def is_consolidated(names: Any) -> bool:
    """Whether tensors have these names."""
    return "tok_embeddings.weight" in names


def plain_name(name: str) -> str:
    """Hugging Face's name of a tensor."""
    for pattern, plain in _NAMES:
        name = pattern.sub(plain, name)
    return name


def half_split(name: str, array: np.ndarray, hf: Mapping[str, Any]) -> np.ndarray:
    """A tensor with its rows as Hugging Face has them: of q and k, pairs (2i, 2i + 1) of a head become (i, i + h / 2).

    Args:
        name: Hugging Face's.
        hf: the configuration, for the number of heads.
    """
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
    match = re.search(r"\.self_attn\.([qk])_proj\.(?:weight|bias|weight_scale)$", name)
    if match is None:
        return array
    count = hf.get(heads[match[1]]) or hf["num_attention_heads"]
    if array.ndim == 0 or len(array) < 2 * count:
        return array  # one scale for all rows
    return array.reshape(count, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def config_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` dictionary that says the same as a `params.json`.

    Raises:
        ValueError: a mixture or attention that has no equal there.
    """
    if params.get("kv_lora_rank") or (params.get("moe") or {}).get("num_shared_experts"):
        raise ValueError(
            "params.json describes latent attention or shared experts, which this layout is not read with."
        )
    hf: dict[str, Any] = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    hf |= {ours: params[theirs] for theirs, ours in _FIELDS.items() if params.get(theirs) is not None}
    hf.setdefault("max_position_embeddings", _CONTEXT)
    hf.setdefault("num_key_value_heads", hf.get("num_attention_heads"))
    window = params.get("sliding_window") or params.get("_sliding_window")
    if isinstance(window, list):
        kinds = [window[layer % len(window)] for layer in range(params["n_layers"])]
        hf["sliding_window"] = next((size for size in window if size), None)
        hf["layer_types"] = ["sliding_attention" if size else "full_attention" for size in kinds]
    elif window:
        hf["sliding_window"] = window
    if moe := params.get("moe"):
        hf |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        hf |= {"num_local_experts": moe["num_experts"], "num_experts_per_tok": moe["num_experts_per_tok"]}
    yarn, growth = params.get("yarn"), params.get("llama_4_scaling")
    if yarn:
        hf["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": float(yarn["factor"]),
            "original_max_position_embeddings": yarn["original_max_position_embeddings"],
            "beta_fast": float(yarn.get("beta", 32.0)),
            "beta_slow": float(yarn.get("alpha", 1.0)),
        }
        if not yarn.get("apply_scale", True):
            hf["rope_parameters"]["attention_factor"] = 1.0
        if "rope_theta" in hf:
            hf["rope_parameters"]["rope_theta"] = float(hf["rope_theta"])
    if growth:
        hf |= {"architectures": ["Ministral3ForCausalLM"], "model_type": "ministral3"}
        scaling = hf.setdefault("rope_parameters", {"rope_type": "default", "rope_theta": hf.get("rope_theta", 1e6)})
        scaling["llama_4_scaling_beta"] = float(growth["beta"])
        scaling.setdefault("original_max_position_embeddings", growth["original_max_position_embeddings"])
    if params.get("quantization"):
        hf["quantization_config"] = _quantization(params["quantization"])
    return hf


def _quantization(said: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's float8 has a scale a tensor; other packers write their own configuration here."""
    if said.get("qformat_weight") == "fp8_e4m3":
        return {"quant_method": "fp8", "activation_scheme": "static"}
    return dict(said)
