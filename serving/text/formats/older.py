"""`vocab.json` with `merges.txt`, and `vocab.txt`: the files from before tokenizer.json.

They do not say how text is cut: the tokenizer's class in tokenizer_config.json does, as in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from serving.text.formats.pretokenizers import GPT2, QWEN2, PreTokenizer

# By the class's name without "Tokenizer" and "Fast", in small letters.
_CUTS = {
    **dict.fromkeys(
        ("gpt2", "gpt", "codegen", "gptneox", "roberta", "bart", "longformer", "led", "opt"), PreTokenizer((GPT2,))
    ),
    **dict.fromkeys(("qwen2", "qwen3"), PreTokenizer((QWEN2,), nfc=True)),
}
_WRAPPED = frozenset({"roberta", "bart", "longformer", "led"})
_TYPES = {"gpt_neox": "gptneox", "gpt_neo": "gpt2", "qwen2_moe": "qwen2", "qwen3_moe": "qwen3", "gpt_bigcode": "gpt2"}


def read_merges(folder: Path, config: Mapping[str, Any], model_type: str) -> Tokenizer:
    """Byte-level BPE from vocab.json and merges.txt.

    Raises:
        ValueError: a file is damaged, or how text is cut is not known; the rest of a sentence.
    """
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer").lower()
    name = name or _TYPES.get(model_type, model_type)
    cut = _CUTS.get(name)
    if cut is None:
        raise ValueError(
            f"how text is cut into words is not known for the tokenizer class {config.get('tokenizer_class')!r} of a "
            f"{model_type or 'nameless'} model; known are {', '.join(sorted(_CUTS))}. Save the model's tokenizer.json."
        )
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if not isinstance(vocab, dict) or not all(isinstance(i, int) for i in vocab.values()):
        raise ValueError("vocab.json is no object of tokens and ids.")
    pairs = []
    for number, line in enumerate((folder / "merges.txt").read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = line.rstrip("\r").split(" ")
        if len(parts) != 2:
            raise ValueError(f"line {number} of merges.txt is not two tokens with a blank between.")
        pairs.append((parts[0], parts[1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = cut.build()
    if config.get("add_prefix_space") is True:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    _add_listed(folder, tokenizer, config)
    if name in _WRAPPED:
        first, last = _text(config.get("cls_token"), "<s>"), _text(config.get("sep_token"), "</s>")
        ids = tokenizer.token_to_id(first), tokenizer.token_to_id(last)
        if ids[0] is not None and ids[1] is not None:
            tokenizer.post_processor = processors.RobertaProcessing((last, ids[1]), (first, ids[0]), False)
    return tokenizer


def read_wordpiece(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    """BERT's WordPiece from vocab.txt, with [CLS] and [SEP] around texts.

    Raises:
        ValueError: the file lacks [UNK], [CLS] or [SEP]; the rest of a sentence.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line.rstrip("\r") or i + 1 < len(lines)}
    named = {
        kind: _text(config.get(f"{kind}_token"), f"[{kind.upper()}]") for kind in ("unk", "cls", "sep", "pad", "mask")
    }
    lacks = [named[kind] for kind in ("unk", "cls", "sep") if named[kind] not in vocab]
    if lacks:
        raise ValueError(f"it has no {', '.join(lacks)}.")
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token=named["unk"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    specials = [text for text in named.values() if text in vocab]
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    cls, sep = named["cls"], named["sep"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
    )
    return tokenizer


def _add_listed(folder: Path, tokenizer: Tokenizer, config: Mapping[str, Any]) -> None:
    """Control tokens that the files beside name: GPT-2's are in the vocabulary, and control tokens all the same."""
    path = folder / "special_tokens_map.json"
    specials = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    names = {_text(value, "") for key, value in {**specials, **config}.items() if key.endswith("_token")}
    known = [name for name in sorted(names) if name and tokenizer.token_to_id(name) is not None]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in known])
    more = folder / "added_tokens.json"
    added = json.loads(more.read_text(encoding="utf-8")) if more.is_file() else {}
    if isinstance(added, dict):
        ordered = sorted((i, text) for text, i in added.items() if isinstance(i, int))
        tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for _, text in ordered])


def _text(value: Any, default: str) -> str:
    value = value.get("content") if isinstance(value, Mapping) else value
    return value if isinstance(value, str) else default
