"""Architectures that were tried, tiny and random, through the bridge, and gave transformers' tokens.

Made by `python -m tests.models.bridge.sweep`; others are tried when somebody loads one.
"""

from __future__ import annotations

_EQUAL = """
    AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM ArceeForCausalLM BeamForCausalLM BertGenerationDecoder
    BertLMHeadModel BioGptForCausalLM BitNetForCausalLM BloomForCausalLM CTRLLMHeadModel CamembertForCausalLM
    CodeGenForCausalLM Cohere2MoeForCausalLM CohereCompassForCausalLM CohereForCausalLM CwmForCausalLM
    Data2VecTextForCausalLM DiffLlamaForCausalLM Dots1ForCausalLM ElectraForCausalLM Ernie4_5ForCausalLM
    Ernie4_5_MoeForCausalLM ErnieForCausalLM ExaoneMoeForCausalLM FalconForCausalLM FlexOlmoForCausalLM FlintForCausalLM
    GPTBigCodeForCausalLM GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTNeoXJapaneseForCausalLM
    Gemma4UnifiedForCausalLM Glm4ForCausalLM GlmForCausalLM GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM
    GraniteSWAForCausalLM HYV3ForCausalLM HeliumForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
    HyperCLOVAXForCausalLM Jais2ForCausalLM Kolibri1ForCausalLM LagunaForCausalLM MellumForCausalLM
    MiMoV2FlashForCausalLM MiniCPM3ForCausalLM ModernBertDecoderForCausalLM MptForCausalLM NanoChatForCausalLM
    NemotronForCausalLM OPTForCausalLM OlmoForCausalLM OpenAIGPTLMHeadModel PersimmonForCausalLM PhiForCausalLM
    PhimoeForCausalLM RoCBertForCausalLM RobertaForCausalLM RobertaPreLayerNormForCausalLM SolarOpenForCausalLM
    StableLmForCausalLM VaultGemmaForCausalLM XGLMForCausalLM XLMRobertaForCausalLM XLMRobertaXLForCausalLM
    YoutuForCausalLM
"""

EQUAL = frozenset(_EQUAL.split())
"""Architectures of transformers' list for text generation that have no family here."""
