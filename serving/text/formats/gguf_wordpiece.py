"""WordPiece vocabularies (BERT's) in GGUF metadata.

GGUF spells pieces as SentencePiece does: what begins a word has a visible blank in front, what continues one has nothing,
where BERT's own vocabulary marks the latter with "##". How text is normalized is not in the file; llama.cpp does what
uncased BERT does, and so is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

BLANK = "\u2581"


def build(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """The tokenizer, with [CLS] and [SEP] around texts and pairs of texts.

    Raises:
        ValueError: the metadata does not say which tokens those are.
    """
    cls = _id(metadata, ("cls", "bos"), len(tokens))
    sep = _id(metadata, ("seperator", "separator", "sep", "eos"), len(tokens))  # the first is GGUF's own spelling
    unknown = _id(metadata, ("unknown",), len(tokens), default=tokens.index("[UNK]") if "[UNK]" in tokens else None)
    pieces = [_piece(token) for token in tokens]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=pieces[unknown]))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = [i for i, token in enumerate(tokens) if token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")]
    tokenizer.add_special_tokens([AddedToken(pieces[i], special=True, normalized=False) for i in special])
    first, last = pieces[cls], pieces[sep]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B:1 {last}:1",
        special_tokens=[(first, cls), (last, sep)],
    )
    return tokenizer


def _piece(token: str) -> str:
    """A token in BERT's spelling."""
    if token.startswith(BLANK):
        return token[1:]
    return token if token.startswith("[") and token.endswith("]") and len(token) > 2 else f"##{token}"


def _id(metadata: Mapping[str, Any], names: Sequence[str], count: int, default: int | None = None) -> int:
    for name in names:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and 0 <= int(token) < count:
            return int(token)
    if default is None:
        raise ValueError(f"The GGUF file has no tokenizer.ggml.{names[0]}_token_id: its tokenizer cannot be built.")
    return default
