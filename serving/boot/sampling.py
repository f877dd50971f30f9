"""What applies to requests that name no sampling parameters: the checkpoint's own word, or else its authors' in print.

A model that is sampled at temperature 1 because its files say nothing writes nonsense, and people take it for the
server's. So families whose authors recommend values have them here, each from the model card or from the
`generation_config.json` of the authors' own repository. Only what leaves greedy decoding alone is taken from the table.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from serving.engine.api.sampling_params import SamplingParams
from serving.errors import RequestError

log = logging.getLogger(__name__)

FIELDS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What of a checkpoint's generation_config applies to requests that leave it open, as in vLLM."""


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """Sampling parameters in force where a request names none.

    Attributes:
        values: field -> value; empty where SamplingParams' own defaults are in force.
        origin: where they are from, in words.
    """

    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    origin: str = "the API's defaults"

    def __str__(self) -> str:
        shown = {"temperature": 1.0, **self.values}
        return ", ".join(f"{name} {value:g}" for name, value in shown.items()) + f" ({self.origin})"


@dataclasses.dataclass(frozen=True)
class _Card:
    """One family's recommendation. `names` is looked for in the model's names and type, in small letters."""

    family: str
    names: str
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def values(self) -> dict[str, Any]:
        found = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        open_ = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
        return {name: value for name, value in found.items() if value != open_.get(name)}


# The first whose pattern is found counts, so the narrower stand before the wider. Sources: a card is huggingface.co/<id>. Of
# Llama 4 and GLM-4.5 no card or generation_config.json was at hand: they have the API's defaults unless their files say more.
CARDS = (
    _Card("SmolLM2", r"smollm2", 0.2, 0.9),  # card of HuggingFaceTB/SmolLM2-1.7B-Instruct
    _Card("SmolLM3", r"smollm3", 0.6, 0.95),  # card of HuggingFaceTB/SmolLM3-3B
    _Card("DeepSeek-R1", r"deepseek[-_ ]?r1", 0.6, 0.95),  # card of deepseek-ai/DeepSeek-R1, "Usage Recommendations"
    _Card("Qwen3-Coder-Next", r"qwen ?-?3[-_ ]coder[-_ ]next", 1.0, 0.95, 40),  # card of Qwen/Qwen3-Coder-Next
    _Card("Qwen3-Coder", r"qwen ?-?3[-_ ]?coder", 0.7, 0.8, 20),  # card of Qwen/Qwen3-Coder-480B-A35B-Instruct
    _Card("Qwen3.5", r"qwen ?-?3[._]?[5-9]", 1.0, 0.95, 20),  # card of Qwen/Qwen3.5-122B-A10B, thinking, general
    _Card(
        "Qwen3 Instruct 2507", r"qwen ?-?3.*instruct", 0.7, 0.8, 20
    ),  # cards of Qwen/Qwen3-*-Instruct-2507, Qwen3-Next
    _Card("Qwen3", r"qwen ?-?3", 0.6, 0.95, 20),  # card of Qwen/Qwen3-235B-A22B-Thinking-2507, and of Qwen/Qwen3-8B
    _Card("QwQ", r"qwq", 0.6, 0.95, 40),  # card of Qwen/QwQ-32B (top_k 20 to 40), its generation_config.json
    _Card(
        "Qwen2.5", r"qwen ?-?2", 0.7, 0.8, 20
    ),  # generation_config.json of Qwen/Qwen2.5-72B-Instruct, of which quants have it
    _Card("Gemma 3", r"gemma[-_ ]?(3|4)", 1.0, 0.95, 64),  # generation_config.json of google/gemma-3-4b-it
    _Card("Magistral", r"magistral", 0.7, 0.95),  # card of mistralai/Magistral-Small-2506, "Sampling parameters"
    _Card("Devstral", r"devstral", 0.15),  # card of mistralai/Devstral-2-123B-Instruct-2512, its examples
    _Card("Mistral Small 3", r"mistral[-_ ]?small", 0.15),  # card of mistralai/Mistral-Small-3.2-24B-Instruct-2506
    _Card("Mistral Nemo", r"mistral[-_ ]?nemo", 0.3),  # card of mistralai/Mistral-Nemo-Instruct-2407
    _Card("Llama 3", r"llama[-_ ]?3", 0.6, 0.9),  # generation_config.json of meta-llama/Llama-3.1-8B-Instruct
    _Card("Kimi K2 Thinking", r"kimi[-_ ]?k2[-_ ]thinking", 1.0),  # card of moonshotai/Kimi-K2-Thinking
    _Card("Kimi K2", r"kimi[-_ ]?k2", 0.6),  # card of moonshotai/Kimi-K2-Instruct
    _Card("MiniMax-M2", r"minimax[-_ ]?m2", 1.0, 0.95, 40),  # cards of MiniMaxAI/MiniMax-M2 and M2.1
    _Card(
        "GLM-4.6", r"glm[-_ ]?(4[._-]?[67]|5)", 1.0, 0.95
    ),  # card of zai-org/GLM-4.6; docs.z.ai says so of later ones
    _Card("LFM2", r"lfm[-_ ]?2", 0.3, min_p=0.15),  # card of LiquidAI/LFM2-1.2B
    _Card(
        "OLMo 3", r"olmo[-_ ]?3", 0.6, 0.95
    ),  # parameters of ollama.com/library/olmo-3, 32b-think and 3.1 32b-instruct
    _Card("EXAONE 4", r"exaone[-_ ]?4", 0.6, 0.95),  # github.com/LG-AI-EXAONE/EXAONE-4.0, "Usage Guideline", reasoning
    _Card("Seed-OSS", r"seed[-_ ]?oss", 1.1, 0.95),  # generation_config.json of ByteDance-Seed/Seed-OSS-36B-Instruct
    _Card("Phi-4 reasoning", r"phi[-_ ]?4.*reasoning", 0.8, 0.95, 50),  # card of microsoft/Phi-4-reasoning-plus
)


def sampling_defaults(
    generation_config: Mapping[str, Any], names: Sequence[str] = (), chats: bool = False
) -> SamplingDefaults:
    """What is in force for a checkpoint.

    Args:
        generation_config: its own, or what its GGUF metadata say; what SamplingParams refuses is left out.
        names: what the model is called: its id, its type, a GGUF file's `general.name` and `general.basename`.
        chats: it has a chat template. Recommendations are made for models that chat, not for bare ones.
    """
    found = {}
    for name in FIELDS:
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            log.warning("the checkpoint's generation_config is ignored in part: %s", error.message)
        else:
            found[name] = value
    if found:
        return SamplingDefaults(found, "the checkpoint's own")
    called = " ".join(name.lower() for name in names if isinstance(name, str))
    for card in CARDS if chats else ():
        if re.search(card.names, called):
            return SamplingDefaults(card.values(), f"recommended for {card.family}")
    return SamplingDefaults()
