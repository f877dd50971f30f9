"""Architectures that were tried, tiny and random, through the bridge, and gave transformers' tokens.

Made by `python -m tests.models.bridge.sweep`; others are tried when somebody loads one.
"""

from __future__ import annotations

_EQUAL = """
    AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BioGptForCausalLM BitNetForCausalLM Cohere2MoeForCausalLM
    CohereForCausalLM CwmForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM ExaoneMoeForCausalLM
    FalconForCausalLM FlexOlmoForCausalLM FlintForCausalLM GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoXForCausalLM
    Glm4ForCausalLM GlmForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM
    HYV3ForCausalLM HeliumForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM HyperCLOVAXForCausalLM
    Jais2ForCausalLM Kolibri1ForCausalLM LagunaForCausalLM MellumForCausalLM MiMoV2FlashForCausalLM
    MiniCPM3ForCausalLM NanoChatForCausalLM NemotronForCausalLM OPTForCausalLM OlmoForCausalLM PersimmonForCausalLM
    PhiForCausalLM PhimoeForCausalLM SolarOpenForCausalLM StableLmForCausalLM VaultGemmaForCausalLM
"""

EQUAL = frozenset(_EQUAL.split())
"""Architectures of transformers' list for text generation that have no family here."""

BESIDE = frozenset(("Mistral4ForCausalLM",))
"""Those that transformers has and does not list."""
