"""How byte-level BPE models cut text into words before the merges apply, by the name that GGUF files give it.

Each pattern is the one in the `pre_tokenizer` of the family's own tokenizer.json.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tokenizers import Regex, pre_tokenizers

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _cl100k(digits: str, letters: str = r"\p{L}", punctuation_end: str = r"[\r\n]*") -> str:
    """The pattern family of tiktoken's cl100k_base: `digits` is how runs of digits are cut."""
    not_word = r"\p{N}" if letters == r"\p{L}" else r"\p{M}\p{N}"
    word = letters if letters == r"\p{L}" else f"[{letters}]"
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{word}+"
        rf"|{digits}"
        rf"| ?[^\s\p{{L}}{not_word}]+{punctuation_end}"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def _o200k(digits: str, contraction: str) -> str:
    """The pattern family of tiktoken's o200k_base, which keeps capitals and small letters apart."""
    upper, lower = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        rf"{lead}[{upper}]*[{lower}]+{contraction}|{lead}[{upper}]+[{lower}]*{contraction}"
        rf"|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


ONE_DIGIT, THREE_DIGITS = r"\p{N}", r"\p{N}{1,3}"
QWEN2 = _cl100k(ONE_DIGIT)
LLAMA3 = _cl100k(THREE_DIGITS)
GPT4O = _o200k(THREE_DIGITS, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
TEKKEN = _o200k(ONE_DIGIT, "")
DEEPSEEK_V3 = (
    THREE_DIGITS,
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
PLAIN = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclasses.dataclass(frozen=True)
class PreTokenizer:
    """One way to cut text.

    Attributes:
        patterns: regular expressions (Oniguruma syntax), each applied to the pieces that the one before left; a match
            is a piece, and so is what lies between two matches.
        single_digits: cut every digit apart first.
        ignore_merges: a piece that is in the vocabulary is one token, whatever the merges say.
        adds_bos: texts start with the BOS token where the file does not say otherwise.
        nfc: text is brought to Unicode's NFC first.
    """

    patterns: tuple[str, ...] = (GPT2,)
    single_digits: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """The library's object for it."""
        steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if self.single_digits else []
        if self.patterns == (GPT2,):  # the library has a faster matcher of its own for this one
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True))
        else:
            steps += [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
        return pre_tokenizers.Sequence(steps)


_gpt2 = PreTokenizer()
_smollm = PreTokenizer(single_digits=True)
_qwen2 = PreTokenizer((QWEN2,), nfc=True)
_llama3 = PreTokenizer((LLAMA3,), ignore_merges=True, adds_bos=True)
_chatglm = PreTokenizer((LLAMA3,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(PLAIN),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _gpt2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _smollm),
    **dict.fromkeys(("qwen2", "megrez"), _qwen2),
    **dict.fromkeys(("stablelm2", "hunyuan", "deepseek-r1-qwen"), PreTokenizer((QWEN2,))),
    "qwen35": PreTokenizer((_cl100k(ONE_DIGIT, r"\p{L}\p{M}"),), nfc=True),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _llama3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _chatglm),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "o200k"), PreTokenizer((GPT4O,))),
    "llama4": PreTokenizer((GPT4O,), adds_bos=True),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), PreTokenizer(DEEPSEEK_V3)),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "falcon": PreTokenizer(FALCON),
}
