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


def _range(points: str) -> str:
    """`41-5A` as a character class has it."""
    return "-".join(rf"\x{{{point}}}" for point in points.split("-"))


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
# The last step finds nothing that the first left together: the file has it.
SPARK = (
    *DEEPSEEK_V3[:2],
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+",
    ONE_DIGIT,
)
# Runs of blanks are cut into powers of two, longest first.
JAIS2 = (
    LLAMA3.removesuffix(r"|\s+(?!\S)|\s+")
    + "".join(rf"|\s{{{count}}}(?!\S)" for count in (512, 256, 128, 64, 32, 16, 8, 4, "1,2"))
    + r"|\s{1}"
)
K2_HORIZON = LLAMA3.replace(r"?\p{L}+", "?(?:\\p{L}|\\p{M}|\u200c|\u200d)+")
DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+", r"\p{N}")
FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]")
# Digits in groups of three, counted from the right.
THREES = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
_NO_HAN = r"&&[^\p{Han}]"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
KIMI_K2 = (
    r"[\p{Han}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NO_HAN}]*[{_LOWER}{_NO_HAN}]+{_SUFFIX}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}{_NO_HAN}]+[{_LOWER}{_NO_HAN}]*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
EXAONE_MOE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
UFAKZEKA = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
YOUTU = (
    "[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥\u3040-ゟ゠-ヿ]+",
    _o200k(ONE_DIGIT, r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"),
)
MINICPM5 = (THREE_DIGITS, _cl100k(r"\p{N}+"))
LAGUNA = (r"[^\n]+|[\n]+", QWEN2)
AFMOE = (
    THREES,
    "[一-鿿㐀-䶿豈-\ufaff\u3040-ゟ゠-ヿ･-ﾟ⼀-\u2fdfเ-\u0e7f\u0e80-\u0effក-\u17ffက-႟ꩠ-ꩿꧠ-\ua9ff가-\ud7afᄀ-ᇿ]+",
    DEEPSEEK_V3[2],
)
CHAMELEON = (
    *("<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", "([\\t\\n]|    |  )", r"\p{N}"),
    *(r"[\p{P}!-/:-@\[-`{-~]", GPT2),
)
# Letters with two cases, as far as Unicode had them: code points, from-to.
_CASED = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376-377 37B-37D 37F 386 388-38A 38C 38E-3A1 "
    "3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B 1D6B-1D77 1D79-1D9A "
    "1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 "
    "1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 "
    "212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183-2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2-2CF3 A640-A66D "
    "A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 "
    "104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943"
)
DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?[" + "".join(_range(part) for part in _CASED.split()) + "]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[一-龥ࠀ-一가-\ud7ff]+",
    r"\p{N}+",
)
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
        adds_sep: a text has the separator (or end) token behind it, and the BOS token before it.
        byte_level: tokens spell bytes by GPT-2's stand-ins; else they are text, with SentencePiece's visible blanks.
        drops_blanks: words are tokens' own text, and what stands between them is no token.
    """

    patterns: tuple[str, ...] = (GPT2,)
    single_digits: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False
    nfc: bool = False
    adds_sep: bool = False
    byte_level: bool = True
    drops_blanks: bool = False

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
_lines = PreTokenizer((), byte_level=False)


def _named(names: str, pre: PreTokenizer) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names.split(), pre)


PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(PLAIN),
    **_named(
        "gpt-2 gpt2 phi-2 mpt olmo jais trillion granite-docling exaone4 gigachat a.x-4.0 mellum modern-bert", _gpt2
    ),
    **_named("jina-es jina-de jina-v2-es jina-v2-de", _gpt2),
    **_named("jina-v1-en jina-v2-code roberta-bpe", PreTokenizer(adds_sep=True)),
    **_named("smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", _smollm),
    **_named("qwen2 megrez kormo f2llmv2", _qwen2),
    **_named("stablelm2 hunyuan deepseek-r1-qwen grok-2 solar-open", PreTokenizer((QWEN2,))),
    "qwen35": PreTokenizer((_cl100k(ONE_DIGIT, r"\p{L}\p{M}"),), nfc=True),
    "ufakzeka": PreTokenizer((UFAKZEKA,)),
    **_named("llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral lfm2 midm-2.0 jina-v5-nano", _llama3),
    **_named("dbrx smaug-bpe glm4 chatglm-bpe", _chatglm),
    "minicpm5": PreTokenizer(MINICPM5, ignore_merges=True),
    "tekken": PreTokenizer((TEKKEN,), ignore_merges=True, adds_bos=True),
    **_named("gpt-4o o200k kanana2 talkie minimax-m2", PreTokenizer((GPT4O,))),
    "granite-embed-multi-97m": PreTokenizer((GPT4O,), ignore_merges=True),
    "llama4": PreTokenizer((GPT4O,), adds_bos=True),
    **_named("tiny_aya cohere2moe", PreTokenizer((r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O))),
    "youtu": PreTokenizer(YOUTU, ignore_merges=True),
    "kimi-k2": PreTokenizer((KIMI_K2,), ignore_merges=True),
    **_named("deepseek-v3 hunyuan-dense hy_v4 joyai-llm", PreTokenizer(DEEPSEEK_V3)),
    "spark2_5": PreTokenizer(SPARK),
    "jais-2": PreTokenizer((JAIS2,)),
    "k2-horizon": PreTokenizer((K2_HORIZON,)),
    "deepseek-llm": PreTokenizer(DEEPSEEK_LLM),
    "deepseek-coder": PreTokenizer(DEEPSEEK_CODER),
    "falcon": PreTokenizer(FALCON),
    "superbpe": PreTokenizer((THREES,)),
    **_named("bailingmoe bailingmoe2 llada-moe", PreTokenizer((BAILING,))),
    "seed-coder": PreTokenizer((SEED_CODER,)),
    "exaone-moe": PreTokenizer((EXAONE_MOE,)),
    "laguna": PreTokenizer(LAGUNA),
    "afmoe": PreTokenizer(AFMOE),
    **_named("poro-chat bloom gpt3-finnish", PreTokenizer((BLOOM,))),
    "viking": PreTokenizer((BLOOM, r"\p{N}")),
    "chameleon": PreTokenizer(CHAMELEON, adds_bos=True),
    **_named("gemma4 granite-embed-multi-311m sarvam-moe", _lines),
    "whitespace": PreTokenizer((), byte_level=False, drops_blanks=True),
}
