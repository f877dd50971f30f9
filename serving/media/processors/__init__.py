"""How each family's images are cut and scaled, and which tokens stand for them: as transformers' processors with Pillow do it, bit
for bit. One file a family; the numbers come from the checkpoint's preprocessor_config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from serving.media.processors.audio import AudioProcessor
from serving.media.processors.base import Processor
from serving.media.processors.clip import ClipProcessor
from serving.media.processors.conformers import Gemma3nProcessor, GraniteProcessor
from serving.media.processors.gemma import Gemma3Processor
from serving.media.processors.gemma4 import Gemma4Processor
from serving.media.processors.glm import GlmProcessor
from serving.media.processors.idefics import IdeficsProcessor
from serving.media.processors.internvl import InternVLProcessor
from serving.media.processors.llama4 import Llama4Processor
from serving.media.processors.next import NextProcessor
from serving.media.processors.pixtral import PixtralProcessor
from serving.media.processors.qwen import QwenVLProcessor


def _llava(hf: Mapping[str, Any]) -> Processor:
    """LLaVA 1.5's, or Pixtral's, whose checkpoints are of the same architecture with another tower."""
    pixtral = hf["vision_config"].get("model_type") == "pixtral"
    return PixtralProcessor.of(hf) if pixtral else ClipProcessor.of(hf)


PROCESSORS: dict[str, Callable[[Mapping[str, Any]], Processor]] = {
    "AudioFlamingo3ForConditionalGeneration": AudioProcessor.flamingo3,
    "Gemma3ForConditionalGeneration": Gemma3Processor.of,
    "Gemma3nForConditionalGeneration": Gemma3nProcessor.of,
    "Gemma4ForConditionalGeneration": Gemma4Processor.of,
    "Glm46VForConditionalGeneration": GlmProcessor.of,
    "Glm4vForConditionalGeneration": GlmProcessor.of,
    "Glm4vMoeForConditionalGeneration": GlmProcessor.of,
    "GraniteSpeechForConditionalGeneration": GraniteProcessor.of,
    "Idefics3ForConditionalGeneration": IdeficsProcessor.of,
    "InternVLForConditionalGeneration": InternVLProcessor.of,
    "Llama4ForConditionalGeneration": Llama4Processor.of,
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": NextProcessor.of,
    "LlavaOnevisionForConditionalGeneration": NextProcessor.of,
    "Mistral3ForConditionalGeneration": PixtralProcessor.of,
    "Qwen2AudioForConditionalGeneration": AudioProcessor.qwen2,
    "Qwen2VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen2_5OmniForConditionalGeneration": AudioProcessor.omni,
    "Qwen2_5OmniModel": AudioProcessor.omni,
    "Qwen2_5OmniThinkerForConditionalGeneration": AudioProcessor.omni,
    "Qwen2_5_VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3VLForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3VLMoeForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3_5ForConditionalGeneration": QwenVLProcessor.of,
    "Qwen3_5MoeForConditionalGeneration": QwenVLProcessor.of,
    "SmolVLMForConditionalGeneration": IdeficsProcessor.of,
    "UltravoxModel": AudioProcessor.ultravox,
    "VoxtralForConditionalGeneration": AudioProcessor.voxtral,
}
"""Of each architecture with a tower, what makes its processor of config.json (with the processor's under "preprocessor")."""
