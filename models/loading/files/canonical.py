"""One name for a tensor, whatever was wrapped around the language model that it belongs to when it was saved."""

from __future__ import annotations

import re

_WRAPPERS = (
    # What torch puts around a module: compiled, data-parallel, sharded or checkpointed ones.
    (re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."), ""),
    (re.compile(r"^(?:module\.)+"), ""),
    (re.compile(r"^thinker\."), ""),  # of Qwen-Omni, beside its voice
    (re.compile(r"^(?:bert|roberta|mpnet|nomic_bert|distilbert)\."), ""),
    (re.compile(r"^backbone\.(?=(?:embeddings?|layers|norm_f)\.)"), "model."),  # Mamba's authors' name
    # What a multimodal network puts around its language model.
    (
        re.compile(
            r"^(?:model\.language_model|language_model\.model|model\.text_model|text_model\.model|llm\.model)\."
        ),
        "model.",
    ),
    (re.compile(r"^model\.(?=(?:visual|vision_tower|audio_tower|multi_modal_projector)\.)"), ""),
    (re.compile(r"^vision_tower\.vision_model\."), "vision_tower."),
    (re.compile(r"^(?:language_model|text_model|llm)\.lm_head\."), "lm_head."),
    (re.compile(r"^(?:language_model|text_model)\.(?=(?:embed_tokens|layers|norm)\.)"), "model."),
    (re.compile(r"^model\.model\.(?=(?:embed_tokens|layers|norm)\.)"), "model."),
    (re.compile(r"^model\.lm_head\."), "lm_head."),
    # OLMo Hybrid's authors', whose layers with attention transformers writes so, too.
    (re.compile(r"(?<=\.)attention_layer_norm\."), "input_layernorm."),
    (re.compile(r"(?<=\.)feedforward_layer_norm\."), "post_attention_layernorm."),
)


def canonical_name(name: str) -> str:
    """The name that the tensor has in the plain language model."""
    for pattern, plain in _WRAPPERS:
        name = pattern.sub(plain, name)
    return name
