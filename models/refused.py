"""Architectures for text that transformers has and that are not served, each with the reason in a sentence."""

from __future__ import annotations

_WITH_ENCODER = "it is the decoder of a network that reads with an encoder"
_ENCODER = (
    "its published checkpoints are encoders; where there is a family for it they are served for embeddings and scores"
)
_OTHER_SENSES = "it is made for images or sound beside text, and its text part has no family of its own"
_DRAFT = "it drafts for another model, whose keys and values it reads"
_INDEXER = "its attention chooses positions with a learned indexer, which needs keys of its own in the cache"
_BIAS = "its attention adds to the scores what it computes of tokens"
_OWN_MASK = "its attention looks at other positions than those before a token, or all within a window"
_STATES = "its layers keep states that no layer here computes"
_NOT_WRITTEN = "no family has been written for it, and transformers' own code of it is not known to go over pages"

_NAMES = {
    _WITH_ENCODER: """
        BartForCausalLM BigBirdPegasusForCausalLM BlenderbotForCausalLM BlenderbotSmallForCausalLM MBartForCausalLM
        MarianForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM MvpForCausalLM PLBartForCausalLM PegasusForCausalLM
        ProphetNetForCausalLM TrOCRForCausalLM WhisperForCausalLM""",
    _ENCODER: """
        BigBirdForCausalLM MegatronBertForCausalLM RemBertForCausalLM RoFormerForCausalLM XLMWithLMHeadModel XmodForCausalLM""",
    _OTHER_SENSES: """
        AriaTextForCausalLM Emu3ForCausalLM FuyuForCausalLM Gemma4UnifiedForConditionalGeneration
        GitForCausalLM GotOcr2ForConditionalGeneration MiniMaxM3VLForCausalLM MllamaForCausalLM MoshiForCausalLM
        MossTranscribeDiarizeForConditionalGeneration Phi4MultimodalForCausalLM""",
    _DRAFT: "Gemma4AssistantForCausalLM Gemma4UnifiedAssistantForCausalLM",
    _INDEXER: """
        AXK2ForCausalLM DeepseekV4ForCausalLM DogeForCausalLM Dots3NoteForCausalLM
        HYV4ForCausalLM Qwen4ExpForCausalLM""",
    _BIAS: "Inkling2ForCausalLM InklingForCausalLM",
    _OWN_MASK: "BltForCausalLM CpmAntForCausalLM HrmTextForCausalLM ReformerModelWithLMHead XLNetLMHeadModel",
    _STATES: """
        BailingHybridForCausalLM Lfm3ForCausalLM MiniMaxForCausalLM RecurrentGemmaForCausalLM RwkvForCausalLM ZambaForCausalLM
        ZayaForCausalLM xLSTMForCausalLM""",
    _NOT_WRITTEN: "DbrxForCausalLM JetMoeForCausalLM LongcatFlashForCausalLM Zamba2ForCausalLM",
}

REFUSED: dict[str, str] = {name: reason for reason, names in _NAMES.items() for name in names.split()}
"""Architecture -> why it is not served."""

UNWRITTEN = frozenset(_NAMES[_NOT_WRITTEN].split())
"""Those for which nobody knows a reason but that: transformers' own code of one may do all the same, and is asked."""
