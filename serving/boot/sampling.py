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


# The first whose pattern is found counts, so the narrower stand before the wider.
CARDS = (
    _Card("SmolLM2", r"smollm2", 0.2, 0.9),
    _Card("SmolLM3", r"smollm3", 0.6, 0.95),
    _Card("DeepSeek-R1", r"deepseek[-_ ]?r1", 0.6, 0.95),
    _Card("Qwen3-Coder", r"qwen ?-?3[-_ .]?(5[-_ ])?coder", 0.7, 0.8, 20),
    _Card("Qwen3 Instruct 2507", r"qwen ?-?3.*instruct", 0.7, 0.8, 20),
    _Card("Qwen3", r"qwen ?-?3", 0.6, 0.95, 20),
    _Card("QwQ", r"qwq", 0.6, 0.95, 40),
    _Card("Qwen2.5", r"qwen ?-?2", 0.7, 0.8, 20),
    _Card("Gemma 3", r"gemma[-_ ]?(3|4)", 1.0, 0.95, 64),
    _Card("Magistral", r"magistral", 0.7, 0.95),
    _Card("Devstral", r"devstral", 0.15),
    _Card("Mistral Small 3", r"mistral[-_ ]?small", 0.15),
    _Card("Mistral Nemo", r"mistral[-_ ]?nemo", 0.3),
    _Card("Llama 3", r"llama[-_ ]?3", 0.6, 0.9),
    _Card("Llama 4", r"llama[-_ ]?4", 0.6, 0.9),
    _Card("Kimi K2", r"kimi[-_ ]?k2", 0.6),
    _Card("MiniMax-M2", r"minimax[-_ ]?m2", 1.0, 0.95, 40),
    _Card("GLM-4.5", r"glm[-_ ]?4[._-]?5", 0.6, 0.95),
    _Card("GLM-4", r"glm[-_ ]?(4[._-]?[67]|5)", 1.0, 0.95),
    _Card("LFM2", r"lfm[-_ ]?2", 0.3, min_p=0.15),
    _Card("OLMo 3", r"olmo[-_ ]?3", 0.6, 0.95),
    _Card("EXAONE 4", r"exaone[-_ ]?4", 0.6, 0.95),
    _Card("Seed-OSS", r"seed[-_ ]?oss", 1.1, 0.95),
    _Card("Phi-4 reasoning", r"phi[-_ ]?4.*reasoning", 0.8, 0.95, 50),
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
