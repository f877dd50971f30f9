"""How each family's images are cut and scaled, and which tokens stand for them: as transformers' processors with Pillow do it, bit
for bit. One file a family; the numbers come from the checkpoint's preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serving.media.processors.base import Processor
from serving.media.processors.clip import ClipProcessor
from serving.media.processors.qwen import QwenVLProcessor

PROCESSORS: dict[str, Callable[[Mapping[str, Any]], Processor]] = {
    "LlavaForConditionalGeneration": ClipProcessor.of,
    "Qwen2VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen2_5_VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3VLMoeForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3_5ForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3_5MoeForConditionalGeneration": QwenVLProcessor.of,
}
"""Of each architecture with a tower, what makes its processor of config.json (with the processor's under "preprocessor")."""
