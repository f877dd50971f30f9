"""Kinds of towers in GGUF: which of Hugging Face's names their tensors have, and what their metadata says in the words of
config.json and preprocessor_config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from models.loading.gguf.file import GGUFFile

BLOCK = re.compile(r"v\.blk\.(\d+)\.(\w+?)\.(weight|bias)$")


@dataclasses.dataclass(frozen=True)
class Kind:
    """One `clip.projector_type`.

    Attributes:
        architectures: of the whole, by the `general.architecture` of the model beside; "" for any other.
        beside: architectures of models that it goes with.
        config: what config.json says of images.
        tokens: keys of config.json for the tokens that stand for them.
        names: of Hugging Face, by the file's name without "weight" or "bias".
        block, parts: where a layer's tensors are, and its parts' names by the file's.
        fused: where q, k and v are one tensor.
        patch: where two frames' weights are one tensor.
        rotated: whether rows of q and k were put in other places.
        ignored: what is read of the model beside.
    """

    architectures: Mapping[str, str]
    config: Callable[[GGUFFile, Mapping[str, Any]], dict[str, Any]]
    tokens: Mapping[str, str]
    names: Mapping[str, str]
    block: str
    parts: Mapping[str, str]
    fused: str = ""
    patch: str = ""
    rotated: bool = False
    ignored: str = ""

    @property
    def beside(self) -> tuple[str, ...]:
        return tuple(self.architectures)

    def architecture(self, arch: str, file: GGUFFile) -> str:
        """Of the whole. Mistral Small 3.1 and Pixtral have one projector's name, and decoders of one."""
        merged = "mm.patch_merger.weight" in file.tensors
        return "Mistral3ForConditionalGeneration" if merged else self.architectures[arch]

    def name_of(self, name: str, file: GGUFFile) -> str | None:
        """Hugging Face's name of a tensor; None where there is none."""
        if match := BLOCK.match(name):
            part = self.parts.get(match[2])
            if part is None:
                return None
            bare = part.startswith("lambda")
            return f"{self.block.format(match[1])}.{part}" + ("" if bare else f".{match[3]}")
        if match := re.match(r"v\.deepstack\.(\d+)\.(norm|fc1|fc2)\.(weight|bias)$", name):
            layers = _deep(file)
            if int(match[1]) not in layers:
                return None
            own = {"norm": "norm", "fc1": "linear_fc1", "fc2": "linear_fc2"}[match[2]]
            return f"visual.deepstack_merger_list.{layers.index(int(match[1]))}.{own}.{match[3]}"
        if name in self.names:
            return self.names[name]
        stem, _, suffix = name.rpartition(".")
        return f"{self.names[stem]}.{suffix}" if stem in self.names and suffix in ("weight", "bias") else None

    def shape_of(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The converter leaves out dimensions of one."""
        if name.endswith("cls_token"):
            return (1, 1, shape[-1])
        return (1, *shape) if name.endswith("position_embeddings") and len(shape) == 2 else shape


def _deep(file: GGUFFile) -> list[int]:
    return [layer for layer, deep in enumerate(file.metadata.get("clip.vision.is_deepstack_layers", ())) if deep]


def _need(file: GGUFFile, name: str) -> Any:
    value = file.metadata.get(f"clip.vision.{name}")
    if value is None:
        raise ValueError(f"{file.path}: the metadata has no clip.vision.{name}.")
    return value


def _get(file: GGUFFile, name: str, default: Any = None) -> Any:
    value = file.metadata.get(f"clip.vision.{name}")
    return default if value is None else value


def _plain(file: GGUFFile) -> dict[str, Any]:
    """What all have. Widths are taken from the tensors: of some files the metadata's are the decoder's."""
    width, patch = _need(file, "embedding_length"), _need(file, "patch_size")
    return {
        "hidden_size": int(width),
        "intermediate_size": int(file.tensors["v.blk.0.ffn_up.weight"].shape[0]),
        "num_hidden_layers": int(_need(file, "block_count")),
        "num_attention_heads": int(_need(file, "attention.head_count")),
        "patch_size": int(patch),
        "image_size": int(_get(file, "image_size", 0)) or None,
        "layer_norm_eps": float(_get(file, "attention.layer_norm_epsilon", 1e-6)),
    }


def _scaled(file: GGUFFile) -> dict[str, Any]:
    return {
        "image_mean": np.asarray(_need(file, "image_mean"), np.float64).tolist(),
        "image_std": np.asarray(_need(file, "image_std"), np.float64).tolist(),
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    """Numbers as they were before they became float32."""
    return {name: [float(f"{one:.8g}") for one in value] for name, value in values.items()}


def _bounds(file: GGUFFile, patch: int, merge: int) -> dict[str, int]:
    """Of an image's area: as the file says, or as llama.cpp bounds it: 8 to 4096 embeddings."""
    square = (patch * merge) ** 2
    least, most = _get(file, "image_min_pixels"), _get(file, "image_max_pixels")
    return {"shortest_edge": int(least or 8 * square), "longest_edge": int(most or 4096 * square)}


def _qwen(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    plain, out = _plain(file), int(text["hidden_size"])
    merge, patch = int(_get(file, "spatial_merge_size", 2)), plain["patch_size"]
    gated = "v.blk.0.ffn_gate.weight" in file.tensors
    vision = {
        "depth": plain["num_hidden_layers"],
        "num_heads": plain["num_attention_heads"],
        "patch_size": patch,
        "spatial_merge_size": merge,
        "temporal_patch_size": 2,
        "intermediate_size": plain["intermediate_size"],
        "out_hidden_size": out,
        "hidden_size": plain["hidden_size"] if gated or "v.position_embd.weight" in file.tensors else out,
        "embed_dim": plain["hidden_size"],
        "mlp_ratio": plain["intermediate_size"] / plain["hidden_size"],
    }
    if (every := _get(file, "n_wa_pattern")) is not None:
        vision["fullatt_block_indexes"] = list(range(int(every) - 1, vision["depth"], int(every)))
        vision["window_size"] = int(_get(file, "window_size", 112))
    if "v.position_embd.weight" in file.tensors:
        vision["num_position_embeddings"] = file.tensors["v.position_embd.weight"].shape[0]
        vision["deepstack_visual_indexes"] = _deep(file)
    said = {**_rounded(_scaled(file)), "patch_size": patch, "merge_size": merge, "size": _bounds(file, patch, merge)}
    return {"vision_config": vision, "preprocessor": said}


def _gemma3(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    vision: dict[str, Any] = _plain(file) | {"model_type": "siglip_vision_model"}
    side = vision["image_size"] // vision["patch_size"]
    tokens = (side // int(_get(file, "projector.scale_factor", 4))) ** 2
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    return {
        "vision_config": vision,
        "mm_tokens_per_image": tokens,
        "preprocessor": {**_rounded(_scaled(file)), "size": size},
    }


def _idefics3(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    vision = _plain(file) | {"model_type": "idefics3_vision"}
    tile = vision["image_size"]
    said = {
        **_rounded(_scaled(file)),
        "size": {"longest_edge": int(_get(file, "preproc_image_size", 4 * tile))},
        "max_image_size": {"longest_edge": tile},
    }
    return {"vision_config": vision, "scale_factor": int(_get(file, "projector.scale_factor", 2)), "preprocessor": said}


def _internvl(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    vision = _plain(file) | {"attention_bias": "v.blk.0.attn_q.bias" in file.tensors}
    side = vision["image_size"]
    said = {
        **_rounded(_scaled(file)),
        "size": {"height": side, "width": side},
        "min_patches": int(_get(file, "preproc_min_tiles", 1)),
        "max_patches": int(_get(file, "preproc_max_tiles", 12)),
    }
    ratio = 1 / int(_get(file, "projector.scale_factor", 2))
    return {"vision_config": vision, "downsample_ratio": ratio, "preprocessor": said}


def _pixtral(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    silu = bool(file.metadata.get("clip.use_silu"))
    vision = _plain(file) | {"model_type": "pixtral", "hidden_act": "silu" if silu else "gelu"}
    merge = int(_get(file, "spatial_merge_size", 2)) if "mm.patch_merger.weight" in file.tensors else 1
    bias = "mm.1.bias" in file.tensors
    return {
        "vision_config": vision, "spatial_merge_size": merge, "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full", "multimodal_projector_bias": bias,
        "preprocessor": {**_rounded(_scaled(file)), "size": {"longest_edge": vision["image_size"]}},
    }  # fmt: skip


def _llava(file: GGUFFile, text: Mapping[str, Any]) -> dict[str, Any]:
    """The file ends with the layer that is read."""
    gelu = bool(file.metadata.get("clip.use_gelu"))
    vision = _plain(file) | {"model_type": "clip_vision_model", "hidden_act": "gelu" if gelu else "quick_gelu"}
    side = vision["image_size"]
    size = {"shortest_edge": side}
    return {
        "vision_config": vision, "vision_feature_layer": -1,
        "multimodal_projector_bias": "mm.0.bias" in file.tensors,
        "preprocessor": {**_rounded(_scaled(file)), "size": size, "crop_size": {"height": side, "width": side}},
    }  # fmt: skip


SIGLIP_PARTS = {
    "ln1": "layer_norm1", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj", "ln2": "layer_norm2", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}  # fmt: skip
QWEN_TOKENS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}


def _siglip(name: str, front: str = "", **more: str) -> dict[str, str]:
    return {
        "v.patch_embd": f"{name}.embeddings.patch_embedding", "v.position_embd": f"{name}.embeddings.position_embedding",
        "v.post_ln": f"{name}.post_layernorm", "v.pre_ln": f"{name}.pre_layrnorm",
        "v.class_embd": f"{name}.embeddings.class_embedding", **more,
    }  # fmt: skip


def _qwen_kind(architectures: Mapping[str, str], up: str, down: str, **more: Any) -> Kind:
    parts = {
        "ln1": "norm1",
        "attn_out": "attn.proj",
        "attn_qkv": "attn.qkv",
        "ln2": "norm2",
        "ffn_up": up,
        "ffn_down": down,
    }
    names = {
        "v.patch_embd": "visual.patch_embed.proj", "v.position_embd": "visual.pos_embed", "v.post_ln": "visual.merger.ln_q",
        "mm.0": "visual.merger.mlp.0", "mm.2": "visual.merger.mlp.2",
    }  # fmt: skip
    return Kind(
        architectures, _qwen, QWEN_TOKENS, names | more.pop("names", {}), "visual.blocks.{}", parts | more.pop("parts", {}),
        fused="visual.blocks.{}.attn.qkv", patch="visual.patch_embed.proj", **more,
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "qwen2vl_merger": _qwen_kind({"qwen2vl": "Qwen2VLForConditionalGeneration"}, "mlp.fc1", "mlp.fc2"),
    "qwen2.5vl_merger": _qwen_kind(
        {"qwen2vl": "Qwen2_5_VLForConditionalGeneration"}, "mlp.up_proj", "mlp.down_proj",
        parts={"ffn_gate": "mlp.gate_proj"},
    ),
    "qwen3vl_merger": _qwen_kind(
        {
            "qwen3vl": "Qwen3VLForConditionalGeneration", "qwen3vlmoe": "Qwen3VLMoeForConditionalGeneration",
            "qwen35": "Qwen3_5ForConditionalGeneration", "qwen35moe": "Qwen3_5MoeForConditionalGeneration",
        },
        "mlp.linear_fc1", "mlp.linear_fc2",
        names={"v.post_ln": "visual.merger.norm", "mm.0": "visual.merger.linear_fc1", "mm.2": "visual.merger.linear_fc2"},
    ),
    "gemma3": Kind(
        {"gemma3": "Gemma3ForConditionalGeneration"}, _gemma3, {"image_token_id": "<image_soft_token>"},
        _siglip("vision_tower") | {
            "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
            "mm.soft_emb_norm": "multi_modal_projector.mm_soft_emb_norm",
        },
        "vision_tower.encoder.layers.{}", SIGLIP_PARTS,
    ),
    "idefics3": Kind(
        {"llama": "Idefics3ForConditionalGeneration"}, _idefics3, {"image_token_id": "<image>"},
        _siglip("model.vision_model") | {"mm.model.fc": "model.connector.modality_projection.proj"},
        "model.vision_model.encoder.layers.{}", SIGLIP_PARTS,
    ),
    "internvl": Kind(
        dict.fromkeys(("qwen2", "qwen3", "llama"), "InternVLForConditionalGeneration"), _internvl,
        {"image_token_id": "<IMG_CONTEXT>"},
        {
            "v.patch_embd": "vision_tower.embeddings.patch_embeddings.projection",
            "v.class_embd": "vision_tower.embeddings.cls_token",
            "v.position_embd.weight": "vision_tower.embeddings.position_embeddings",
            "mm.model.mlp.0": "multi_modal_projector.layer_norm", "mm.model.mlp.1": "multi_modal_projector.linear_1",
            "mm.model.mlp.3": "multi_modal_projector.linear_2",
        },
        "vision_tower.encoder.layer.{}",
        {
            "ln1": "layernorm_before", "attn_q": "attention.q_proj", "attn_k": "attention.k_proj", "attn_v": "attention.v_proj",
            "attn_out": "attention.projection_layer", "ln2": "layernorm_after", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
            "ls1": "lambda_1", "ls2": "lambda_2",
        },
    ),
    "pixtral": Kind(
        {"llama": "LlavaForConditionalGeneration", "mistral3": "LlavaForConditionalGeneration"}, _pixtral,
        {"image_token_id": "[IMG]"},
        {
            "v.patch_embd": "vision_tower.patch_conv", "v.pre_ln": "vision_tower.ln_pre",
            "mm.1": "multi_modal_projector.linear_1", "mm.2": "multi_modal_projector.linear_2",
            "mm.input_norm": "multi_modal_projector.norm", "mm.patch_merger": "multi_modal_projector.patch_merger.merging_layer",
        },
        "vision_tower.transformer.layers.{}",
        {
            "ln1": "attention_norm", "attn_q": "attention.q_proj", "attn_k": "attention.k_proj", "attn_v": "attention.v_proj",
            "attn_out": "attention.o_proj", "ln2": "ffn_norm", "ffn_gate": "feed_forward.gate_proj",
            "ffn_up": "feed_forward.up_proj", "ffn_down": "feed_forward.down_proj",
        },
        rotated=True, ignored=r"v\.token_embd\.img_break",
    ),
    "mlp": Kind(
        {"llama": "LlavaForConditionalGeneration"}, _llava, {"image_token_id": "<image>"},
        _siglip("vision_tower") | {
            "v.class_embd": "vision_tower.embeddings.class_embedding",
            "mm.0": "multi_modal_projector.linear_1", "mm.2": "multi_modal_projector.linear_2",
        },
        "vision_tower.encoder.layers.{}", SIGLIP_PARTS,
    ),
}  # fmt: skip
"""By `clip.projector_type`."""
