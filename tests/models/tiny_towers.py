"""The tiny models that read images: transformers' classes of each family, its tower, and what stands in a prompt for an image."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

VOCAB = 384
START, END, VISION_START, VISION_END, IMAGE, VIDEO = range(370, 376)
VIDEO_START, VIDEO_STOP = "<|begin_of_video|>", "<|end_of_video|>"
"""Around GLM's videos, whose places have the images' token: they are the tokens behind `VIDEO`."""
ROWS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_MARK = "<|vision_start|><|image_pad|><|vision_end|>"
TEXT = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
}  # fmt: skip
IDS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END, "tie_word_embeddings": False,
}  # fmt: skip
INDEX = {"image_token_index": IMAGE, "tie_word_embeddings": False}


@dataclasses.dataclass(frozen=True)
class TinyVision:
    """transformers' classes of a family, and its tower.

    Attributes:
        config, model: the beginnings of their names.
        processor: what its image processor is made with.
        text: fields of the decoder's configuration.
        ids: of the whole's.
        tokens: of the tokenizer from `VISION_START` on; the third is what embeddings are put in.
        mark, video_mark: what the chat template writes where an image and a video is.
        videos: what its video processor is made with; nothing where there is none.
        engine: settings of the small engine that it needs otherwise than others.
    """

    model: str
    image_processor: str
    vision: Mapping[str, Any]
    processor: Mapping[str, Any]
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ids: Mapping[str, Any] = dataclasses.field(default_factory=lambda: IDS)
    tokens: tuple[str, ...] = QWEN_TOKENS
    mark: str = QWEN_MARK
    videos: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def video_mark(self) -> str:
        if VIDEO_START in self.tokens:
            return f"{VIDEO_START}{self.tokens[3]}{VIDEO_STOP}"
        return self.mark.replace(self.tokens[2], self.tokens[3]) if len(self.tokens) > 3 else ""

    @property
    def config(self) -> str:
        return self.model.removesuffix("ForConditionalGeneration") + "Config"


SMALL = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 64}
CLIPS = {"size": {"shortest_edge": 28 * 28 * 2, "longest_edge": 28 * 28 * 12}}
TINY: dict[str, TinyVision] = {
    "Qwen2-VL": TinyVision(
        "Qwen2VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "mlp_ratio": 2}, SMALL, videos=CLIPS,
    ),
    "Qwen2.5-VL": TinyVision(
        "Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        {"depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
         "fullatt_block_indexes": [1]}, SMALL, videos=CLIPS,
    ),
}  # fmt: skip
QWEN3 = {
    "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
    "patch_size": 16,
}  # fmt: skip
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
QWEN3_TEXT = {"head_dim": 16, "rope_parameters": MROPE}
HYBRID = QWEN3_TEXT | {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_key_head_dim": 16,
    "linear_num_value_heads": 4, "linear_value_head_dim": 16, "rope_parameters": MROPE | {"partial_rotary_factor": 1.0},
}  # fmt: skip
SMALL3 = HALF | {"patch_size": 16, "size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 64}}
CLIPS3 = HALF | {"size": {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 48}}
TINY |= {
    "Qwen3-VL": TinyVision(
        "Qwen3VLForConditionalGeneration", "Qwen2VLImageProcessorPil",
        QWEN3 | {"deepstack_visual_indexes": [0, 2]}, SMALL3, QWEN3_TEXT | {"num_hidden_layers": 3},
        videos=CLIPS3,
    ),
    "Qwen3-VL MoE": TinyVision(
        "Qwen3VLMoeForConditionalGeneration", "Qwen2VLImageProcessorPil",
        QWEN3 | {"deepstack_visual_indexes": [1]}, SMALL3,
        QWEN3_TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, videos=CLIPS3,
    ),
    "Qwen3.5": TinyVision("Qwen3_5ForConditionalGeneration", "Qwen2VLImageProcessorPil", QWEN3, SMALL3, HYBRID, videos=CLIPS3),
    "Qwen3.5 MoE": TinyVision(
        "Qwen3_5MoeForConditionalGeneration", "Qwen2VLImageProcessorPil", QWEN3, SMALL3,
        HYBRID | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 48}, videos=CLIPS3,
    ),
}  # fmt: skip
PLAIN = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
LLAMA = PLAIN | {"model_type": "llama"}
MISTRAL = PLAIN | {"model_type": "mistral", "head_dim": 16, "sliding_window": None}
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 2, "patch_size": 14, "image_size": 84, "projection_dim": 32,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "image_size": 56, "num_hidden_layers": 2}
PIXTRAL = {
    "model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "head_dim": 16, "patch_size": 16, "image_size": 96,
}  # fmt: skip
IMAGE_TOKENS = ("<unused_1>", "<unused_2>", "<image>", "<video>")
IMG = ("[IMG_BREAK]", "[IMG_END]", "[IMG]")
SPLIT = ("<fake_token_around_image>", "<global-img>", "<image>", *ROWS)
TILES = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
PINPOINTS = [[56, 112], [112, 56]]
MANY = [[56, 56], [56, 112], [112, 56], [112, 112], [112, 168], [168, 112]]
TINY |= {
    "LLaVA 1.5": TinyVision(
        "LlavaForConditionalGeneration", "CLIPImageProcessorPil", CLIP,
        {"size": {"shortest_edge": 84}, "crop_size": {"height": 84, "width": 84}}, LLAMA, INDEX,
    ),
    "Pixtral": TinyVision(
        "LlavaForConditionalGeneration", "PixtralImageProcessorPil", PIXTRAL,
        {"size": {"longest_edge": 96}, "patch_size": {"height": 16, "width": 16}}, MISTRAL,
        INDEX | {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}, IMG, "[IMG]",
    ),
    "Mistral Small 3.1": TinyVision(
        "Mistral3ForConditionalGeneration", "PixtralImageProcessorPil", PIXTRAL | {"patch_size": 14, "image_size": 168},
        {"size": {"longest_edge": 168}, "patch_size": {"height": 28, "width": 28}}, MISTRAL, INDEX, IMG, "[IMG]",
    ),
    "LLaVA-NeXT": TinyVision(
        "LlavaNextForConditionalGeneration", "LlavaNextImageProcessorPil", CLIP | {"image_size": 56},
        {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}, "image_grid_pinpoints": PINPOINTS}, LLAMA,
        INDEX | {"image_grid_pinpoints": PINPOINTS}, IMAGE_TOKENS, "<image>",
    ),
    "LLaVA-OneVision": TinyVision(
        "LlavaOnevisionForConditionalGeneration", "LlavaOnevisionImageProcessorPil", SIGLIP,
        {"size": {"height": 56, "width": 56}, "image_grid_pinpoints": MANY}, PLAIN | {"model_type": "qwen2"},
        INDEX | {"image_grid_pinpoints": MANY, "vision_aspect_ratio": "anyres_max_1", "video_token_index": VIDEO}, IMAGE_TOKENS,
        "<image>", {"size": {"height": 56, "width": 56}},
    ),
    "Idefics3": TinyVision(
        "Idefics3ForConditionalGeneration", "Idefics3ImageProcessorPil", SIGLIP | {"model_type": "idefics3_vision"}, TILES, LLAMA,
        {"image_token_id": IMAGE, "scale_factor": 2, "tie_word_embeddings": False}, SPLIT, "<image>",
    ),
    "SmolVLM": TinyVision(
        "SmolVLMForConditionalGeneration", "SmolVLMImageProcessorPil", SIGLIP | {"model_type": "smolvlm_vision"}, TILES, LLAMA,
        {"image_token_id": IMAGE, "scale_factor": 4, "tie_word_embeddings": False}, SPLIT, "<image>",
    ),
    "InternVL": TinyVision(
        "InternVLForConditionalGeneration", "GotOcr2ImageProcessorPil",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": [56, 56],
         "patch_size": [14, 14]},
        {"size": {"height": 56, "width": 56}, "crop_to_patches": True, "max_patches": 4}, PLAIN | {"model_type": "qwen2"},
        {"image_token_id": IMAGE, "tie_word_embeddings": False}, ("<img>", "</img>", "<IMG_CONTEXT>"), "<IMG_CONTEXT>",
    ),
    "Gemma 3": TinyVision(
        "Gemma3ForConditionalGeneration", "Gemma3ImageProcessorPil", SIGLIP | {"image_size": 112},
        {"size": {"height": 112, "width": 112}},
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"],
         "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        INDEX | {"boi_token_index": VISION_START, "eoi_token_index": VISION_END, "mm_tokens_per_image": 16},
        ("<start_of_image>", "<end_of_image>", "<image_soft_token>"), "<start_of_image>",
    ),
}  # fmt: skip
GLM = {
    "depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "intermediate_size": 48, "image_size": 84,
    "patch_size": 14,
}  # fmt: skip
GLM_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
GLM_TOKENS = ("<|begin_of_image|>", "<|end_of_image|>", "<|image|>", "<|video|>", VIDEO_START, VIDEO_STOP)
GLM_MARK = "<|begin_of_image|><|image|><|end_of_image|>"
IDS_GLM = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO + 1, "video_end_token_id": VIDEO + 2, "tie_word_embeddings": False,
}  # fmt: skip
CLIPS_GLM = {"size": {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 48}}
SMALL_GLM = {"size": {"shortest_edge": 28 * 28 * 8, "longest_edge": 28 * 28 * 128}}
TINY |= {
    "Gemma 4": TinyVision(
        "Gemma4ForConditionalGeneration", "Gemma4ImageProcessorPil",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "head_dim": 16, "patch_size": 4, "position_embedding_size": 256, "use_clipped_linears": True, "standardize": True},
        {"patch_size": 4, "max_soft_tokens": 70},
        {"head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 4, "sliding_window": 12,
         "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 16,
         "vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 2, "use_bidirectional_attention": "vision",
         "rope_parameters": {"full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
                             "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": VISION_START, "eoi_token_id": VISION_END,
         "tie_word_embeddings": True},
        ("<|image>", "<image|>", "<|image|>", "<|video|>"), "<|image|>", {"patch_size": 4, "max_soft_tokens": 70, "num_frames": 2},
        engine={"max_model_len": 288, "max_num_batched_tokens": 96, "kv_cache_memory": 28 * 4096},
    ),
    "GLM-4.1V": TinyVision(
        "Glm4vForConditionalGeneration", "Glm4vImageProcessorPil", GLM, SMALL_GLM,
        {"rope_parameters": GLM_ROPE},
        IDS_GLM, GLM_TOKENS, GLM_MARK, CLIPS_GLM,
    ),
    "GLM-4.5V": TinyVision(
        "Glm4vMoeForConditionalGeneration", "Glm4vImageProcessorPil", GLM, SMALL_GLM,
        {"rope_parameters": GLM_ROPE, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
         "n_shared_experts": 1, "routed_scaling_factor": 1.5},
        IDS_GLM, GLM_TOKENS, GLM_MARK, CLIPS_GLM,
    ),
    "GLM-4.6V": TinyVision(
        "Glm46VForConditionalGeneration", "Glm46VImageProcessorPil", GLM | {"model_type": "glm4v_vision"}, SMALL_GLM,
        {"rope_parameters": GLM_ROPE, "model_type": "glm4v_text"}, IDS_GLM, GLM_TOKENS, GLM_MARK, CLIPS_GLM,
    ),
    "Llama 4": TinyVision(
        "Llama4ForConditionalGeneration", "",  # tests/models/tiny_llama4.py
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56,
         "patch_size": 14, "projector_input_dim": 48, "projector_output_dim": 48, "vision_output_dim": 48},
        {"size": {"height": 56, "width": 56}, "max_patches": 4},
        PLAIN | {"intermediate_size_mlp": 80, "interleave_moe_layer_step": 2, "no_rope_layer_interval": 2, "num_local_experts": 4,
                 "num_experts_per_tok": 1, "head_dim": 16, "floor_scale": 8, "attention_chunk_size": 256},
        {"image_token_index": IMAGE, "boi_token_index": VISION_START, "eoi_token_index": VISION_END, "tie_word_embeddings": False},
        ("<|image_start|>", "<|image_end|>", "<|patch|>", "<|video|>", "<|image|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        "<|image|>",
    ),
}  # fmt: skip
