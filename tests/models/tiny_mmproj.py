"""Writes the tower of a tiny Hugging Face checkpoint as llama.cpp's converter does: its names, its permutations, its metadata; and
the decoder beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.models import tiny_vision
from tests.models.tiny_gguf import to_gguf
from tests.models.tiny_towers import TINY

KINDS = {
    "Qwen2-VL": "qwen2vl_merger", "Qwen2.5-VL": "qwen2.5vl_merger", "Qwen3-VL": "qwen3vl_merger", "Gemma 3": "gemma3",
    "Idefics3": "idefics3", "InternVL": "internvl", "Pixtral": "pixtral", "Mistral Small 3.1": "pixtral", "LLaVA 1.5": "mlp",
}  # fmt: skip
TEXT = {
    "Qwen2-VL": "qwen2vl", "Qwen2.5-VL": "qwen2vl", "Qwen3-VL": "qwen3vl", "Gemma 3": "gemma3", "Idefics3": "llama",
    "InternVL": "qwen2", "Pixtral": "llama", "Mistral Small 3.1": "llama", "LLaVA 1.5": "llama",
}  # fmt: skip
"""`general.architecture` of the decoder beside each."""


def write(name: str, folder: Path, path: Path) -> None:
    """The tower of the checkpoint in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    said = json.loads((folder / "preprocessor_config.json").read_text())
    vision = {
        "image_size": None,
        **TINY[name].vision,
        **{k: v for k, v in config["vision_config"].items() if v is not None},
    }
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", KINDS[name])
    for key, value in _metadata(name, config, vision, said).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}[
            type(value)
        ]
        add(key, value)
    heads = vision.get("num_attention_heads") or vision["num_heads"]
    layers = _metadata(name, config, vision, said)["clip.vision.block_count"]
    for own, array in load_file(folder / "model.safetensors").items():
        for there, made in _tensors(name, own, array, heads, config, layers):
            writer.add_tensor(there, np.ascontiguousarray(made, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _metadata(name: str, config: dict, vision: dict, said: dict) -> dict[str, Any]:
    first = lambda value: value[0] if isinstance(value, list) else value  # noqa: E731
    layers = vision.get("num_hidden_layers") or vision["depth"]
    keys: dict[str, Any] = {
        "image_size": first(vision["image_size"]) or 560,
        "patch_size": first(vision["patch_size"]),
        "embedding_length": vision.get("embed_dim") or vision["hidden_size"],
        "feed_forward_length": vision.get("intermediate_size") or vision["hidden_size"],
        "block_count": layers - 1 if name == "LLaVA 1.5" else layers,
        "attention.head_count": vision.get("num_attention_heads") or vision["num_heads"],
        "attention.layer_norm_epsilon": float(vision.get("layer_norm_eps") or 1e-6),
        "image_mean": said["image_mean"],
        "image_std": said["image_std"],
    }
    more: dict[str, Any] = {}
    if name.startswith("Qwen"):
        size = said["size"]
        keys |= {
            "image_min_pixels": size["shortest_edge"],
            "image_max_pixels": size["longest_edge"],
            "spatial_merge_size": 2,
        }
    if name == "Qwen2.5-VL":
        keys["n_wa_pattern"] = vision["fullatt_block_indexes"][0] + 1
        more["clip.use_silu"] = True
    if name == "Qwen3-VL":
        keys["is_deepstack_layers"] = [layer in vision["deepstack_visual_indexes"] for layer in range(layers)]
    if name == "Gemma 3":
        keys["projector.scale_factor"] = (
            vision["image_size"] // vision["patch_size"] // round(config["mm_tokens_per_image"] ** 0.5)
        )
    if name == "Idefics3":
        keys |= {"projector.scale_factor": config["scale_factor"], "preproc_image_size": said["size"]["longest_edge"]}
    if name == "InternVL":
        keys |= {
            "projector.scale_factor": round(1 / config["downsample_ratio"]),
            "preproc_max_tiles": said["max_patches"],
        }
    if name in ("Pixtral", "Mistral Small 3.1"):
        more[f"clip.use_{vision.get('hidden_act', 'gelu')}"] = True
        if name != "Pixtral":
            keys["spatial_merge_size"] = config["spatial_merge_size"]
    return {f"clip.vision.{key}": value for key, value in keys.items()} | more


PLAIN = {
    r"(?:model\.)?(?:vision_tower\.vision_model|vision_tower|vision_model)\.embeddings\.patch_embedding\.": "v.patch_embd.",
    r".*\.embeddings\.position_embedding\.": "v.position_embd.",
    r".*\.embeddings\.class_embedding$": "v.class_embd",
    r".*\.post_layernorm\.": "v.post_ln.",
    r".*\.pre_layrnorm\.": "v.pre_ln.",
    r".*\.patch_conv\.": "v.patch_embd.",
    r".*\.ln_pre\.": "v.pre_ln.",
    r".*\.connector\.modality_projection\.proj\.": "mm.model.fc.",
    r".*multi_modal_projector\.mm_input_projection_weight": "mm.input_projection.weight",
    r".*multi_modal_projector\.mm_soft_emb_norm\.": "mm.soft_emb_norm.",
    r".*multi_modal_projector\.norm\.": "mm.input_norm.",
    r".*multi_modal_projector\.patch_merger\.merging_layer\.": "mm.patch_merger.",
    r".*visual\.pos_embed\.": "v.position_embd.",
    r".*visual\.patch_embed\.proj\.bias": "v.patch_embd.bias",
    r".*visual\.merger\.(?:ln_q|norm)\.": "v.post_ln.",
    r".*visual\.merger\.(?:mlp\.0|linear_fc1)\.": "mm.0.",
    r".*visual\.merger\.(?:mlp\.2|linear_fc2)\.": "mm.2.",
    r".*embeddings\.patch_embeddings\.projection\.": "v.patch_embd.",
    r".*embeddings\.cls_token$": "v.class_embd",
    r".*embeddings\.position_embeddings$": "v.position_embd.weight",
}
LAYER = re.compile(r".*(?:visual\.blocks|encoder\.layers?|transformer\.layers)\.(\d+)\.(.+?)(?:\.(weight|bias))?$")
PARTS = {
    "norm1": "ln1", "layer_norm1": "ln1", "layernorm_before": "ln1", "attention_norm": "ln1", "norm2": "ln2", "layer_norm2": "ln2",
    "layernorm_after": "ln2", "ffn_norm": "ln2", "attn.proj": "attn_out", "self_attn.out_proj": "attn_out",
    "attention.o_proj": "attn_out", "attention.projection_layer": "attn_out", "attn.qkv": "attn_qkv", "lambda_1": "ls1",
    "lambda_2": "ls2",
    **{f"{block}.{part}_proj": f"attn_{part}" for block in ("self_attn", "attention") for part in "qkv"},
    **{f"{block}.{part}_proj": f"ffn_{part}" for block in ("mlp", "feed_forward") for part in ("gate", "up", "down")},
    "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down", "mlp.linear_fc1": "ffn_up", "mlp.linear_fc2": "ffn_down",
}  # fmt: skip


def _tensors(
    name: str, own: str, array: np.ndarray, heads: int, config: dict, layers: int
) -> list[tuple[str, np.ndarray]]:
    if (
        not re.search(r"visual\.|vision_|multi_modal_projector|connector", own)
        or own.endswith("mask_token")
        or ".head." in own
    ):
        return []
    if match := re.search(r"deepstack_merger_list\.(\d+)\.(?:linear_)?(norm|fc1|fc2)\.(\w+)$", own):
        layer = config["vision_config"]["deepstack_visual_indexes"][int(match[1])]
        return [(f"v.deepstack.{layer}.{match[2]}.{match[3]}", array)]
    if own.endswith("patch_embed.proj.weight"):
        return [("v.patch_embd.weight", array[:, :, 0]), ("v.patch_embd.weight.1", array[:, :, 1])]
    if match := LAYER.match(own):
        part = PARTS[match[2]]
        if int(match[1]) >= layers:
            return []
        if part == "attn_qkv" and name != "Qwen3-VL":
            return [
                (f"v.blk.{match[1]}.attn_{one}.{match[3]}", piece)
                for one, piece in zip("qkv", np.split(array, 3), strict=True)
            ]
        if name in ("Pixtral", "Mistral Small 3.1") and part in ("attn_q", "attn_k"):
            array = array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return [(f"v.blk.{match[1]}.{part}.{match[3] or 'weight'}", array)]
    if match := re.search(r"multi_modal_projector\.(linear_\d|layer_norm)\.(\w+)$", own):
        if name == "InternVL":
            return [(f"mm.model.mlp.{ {'layer_norm': 0, 'linear_1': 1, 'linear_2': 3}[match[1]] }.{match[2]}", array)]
        number = {"linear_1": 0, "linear_2": 2}[match[1]] if name == "LLaVA 1.5" else int(match[1][-1])
        return [(f"mm.{number}.{match[2]}", array)]
    for pattern, plain in PLAIN.items():
        if match := re.match(pattern, own):
            there = plain + own[match.end() :] if plain.endswith(".") else plain
            return [(there, array.squeeze() + (1 if there == "mm.soft_emb_norm.weight" else 0))]
    raise AssertionError(f"{own} has no place")


def tokens_of(name: str) -> list[str]:
    """The vocabulary of the decoder beside it."""
    words = tiny_vision.tokenizer_of(name)
    found = [words.id_to_token(i) for i in range(words.get_vocab_size())]
    return ["<image>" if token == "<|image_pad|>" and name == "LLaVA 1.5" else token for token in found]


def rewritten(source: Path, target: Path, change: Callable[[dict, dict], Any]) -> Path:
    """A copy whose metadata and tensors `change` was shown."""
    reader = gguf.GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(fields, tensors)
    arch = fields.pop("general.architecture")
    writer = gguf.GGUFWriter(target, arch)
    for key, value in fields.items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key, value)
    for key, value in tensors.items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


CAUSAL = {
    "qwen2vl": "Qwen2ForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3vl": "Qwen3ForCausalLM", "gemma3": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
}  # fmt: skip


def write_text(name: str, folder: Path, path: Path) -> None:
    """The decoder of the checkpoint in `folder`, as a GGUF model."""
    arch, text = TEXT[name], json.loads((folder / "config.json").read_text())["text_config"]
    plain = path.parent / f"{path.stem}-text"
    plain.mkdir()
    tensors = {
        re.sub(r"^(model\.)?((language|text)_model\.)?(model\.)?", "" if "lm_head" in own else "model.", own): values
        for own, values in load_file(folder / "model.safetensors").items()
        if not re.search(r"visual\.|vision_|multi_modal_projector|connector", own)
    }
    save_file(tensors, plain / "model.safetensors")
    config = {**text, "architectures": [CAUSAL[arch]], "tie_word_embeddings": "lm_head.weight" not in tensors}
    (plain / "config.json").write_text(json.dumps(config))
    to_gguf(plain, plain / "plain.gguf")

    def change(fields: dict, tensors: dict) -> None:
        was, words = fields["general.architecture"], tokens_of(name)
        for key in [key for key in fields if key.startswith(f"{was}.")]:
            fields[arch + key.removeprefix(was)] = fields.pop(key)
        fields |= {"general.architecture": arch, "tokenizer.ggml.tokens": words}
        if sections := (text.get("rope_parameters") or {}).get("mrope_section") if arch.endswith("vl") else None:
            fields[f"{arch}.rope.dimension_sections"] = [*sections, 0]
        if arch == "gemma3":  # the real ones have six layers a turn, which nobody writes
            windowed = [kind == "sliding_attention" for kind in text["layer_types"]]
            fields["gemma3.attention.sliding_window_pattern"] = windowed

    rewritten(plain / "plain.gguf", path, change)
