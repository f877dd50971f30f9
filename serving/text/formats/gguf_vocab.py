"""Tokenizers from GGUF metadata (`tokenizer.ggml.*`, the keys of the GGUF specification).

A GGUF file holds the vocabulary but only a *name* for how text is cut before the merges apply. The table in
`pretokenizers.py` gives each name its meaning; an unknown name is an error, since a wrong cut gives wrong tokens
without any other sign.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serving.text.formats import gguf_wordpiece
from serving.text.formats.pieces import SPACE, TokenType, set_template
from serving.text.formats.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from serving.text.formats.unigram import charsmap, unigram

# Control tokens that end a turn or a text in the model families that GGUF files come from. A file names one or two
# of them as its end tokens; a chat model may emit any of them.
END_NAMES = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<end_of_turn>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "<EOT>",
    "<|return|>",
    "<|call|>",
)
_BPE = ("gpt2", "gemma4", "whitespace")
"""Kinds of tokenizer, `tokenizer.ggml.model`, with merges in the file."""


def build(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that `metadata` describes.

    Args:
        metadata: GGUF key to plain Python value (str, int, float, bool, sequences of them).
    Raises:
        ValueError: keys are missing or contradict each other, or the kind of tokenizer is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    if kind in _BPE and _pre_tokenizer(metadata).drops_blanks:
        tokenizer = _raw_words(metadata, tokens)
    elif kind in ("gpt2", "gemma4"):
        plain = kind == "gemma4" or not _pre_tokenizer(metadata).byte_level
        tokenizer = _raw_merges(metadata, tokens, types) if plain else _byte_level(metadata, tokens, types)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types)
    elif kind == "bert":
        return gguf_wordpiece.build(metadata, tokens)
    elif kind == "t5":
        return _unigram(metadata, tokens, types)
    else:
        raise ValueError(
            f"tokenizer.ggml.model is {kind!r}; 'gpt2', 'gemma4' and 'whitespace' (BPE), 'llama' and 't5' (SentencePiece) and "
            "'bert' (WordPiece) can be read. Put the model's tokenizer.json beside it and name the folder instead."
        )
    _add_tokens(tokenizer, tokens, types)
    bos = metadata.get("tokenizer.ggml.bos_token_id") if _adds_bos(metadata, kind) else None
    set_template(tokenizer, bos, _added_end(metadata, kind))
    return tokenizer


def end_token_ids(metadata: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a completion: the file's own first, then control tokens known by their name to end one."""
    tokens = _tokens(metadata)
    types = _types(metadata, len(tokens))
    found: dict[int, None] = {}
    for name in ("eos", "eot", "eom"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None and 0 <= int(token) < len(tokens):
            found[int(token)] = None
    names = set(END_NAMES)
    if "<|channel|>" in tokens:
        names.remove("<|end|>")  # it ends a message on a channel, of which a reply has several
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == TokenType.CONTROL and token in names:
            found[i] = None
    return tuple(found)


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    pre = _pre_tokenizer(metadata)
    vocab = {token: i for i, token in enumerate(tokens[: _model_size(types)])}
    tokenizer = Tokenizer(_merging(metadata, vocab, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.build()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _raw_merges(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    """Merges over text with visible blanks, as Gemma's tokenizer.json has them: no words are cut out first."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = int(metadata.get("tokenizer.ggml.unknown_token_id", 0))
    if not 0 <= unknown < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id is {unknown}, outside the {len(tokens)} tokens.")
    model = _merging(metadata, vocab, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _raw_words(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Tokenizer:
    """Merges over the text's own characters within words; what stands between words is no token. Of what no token spells nothing
    is left, unless the file names an unknown token."""
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None and not 0 <= int(unknown) < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id is {unknown}, outside the {len(tokens)} tokens.")
    options = {} if unknown is None else {"unk_token": tokens[int(unknown)]}
    tokenizer = Tokenizer(_merging(metadata, vocab, **options))
    if metadata.get("tokenizer.ggml.normalizer.lowercase"):
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _unigram(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError("The GGUF file's tokenizer.ggml.scores does not have one score a token.")
    known = {**metadata, "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    known["tokenizer.ggml.scores"] = _plain_list(scores)
    rules = metadata.get("tokenizer.ggml.precompiled_charsmap")
    tokenizer = unigram(
        known,
        charsmap(b"" if rules is None else bytes(bytearray(_plain_list(rules)))),
        bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
    )
    bos = metadata.get("tokenizer.ggml.bos_token_id") if metadata.get("tokenizer.ggml.add_bos_token") else None
    set_template(tokenizer, bos, _added_end(metadata, "t5"))
    return tokenizer


def _merging(metadata: Mapping[str, Any], vocab: dict[str, int], **options: Any) -> models.BPE:
    """The BPE model of a file's merges."""
    merges = metadata.get("tokenizer.ggml.merges")
    if merges is None or isinstance(merges, str):
        raise ValueError("The GGUF file has no tokenizer.ggml.merges: its byte-level BPE cannot be built.")
    pairs = []
    for merge in merges:
        at = merge.find(" ", 1)
        if at < 0:
            raise ValueError(f"tokenizer.ggml.merges has {merge!r}, which is not two tokens with a blank between.")
        pairs.append((merge[:at], merge[at + 1 :]))
    try:
        return models.BPE(vocab=vocab, merges=pairs, **options)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from None


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ValueError("The GGUF file's tokenizer.ggml.scores does not have one score a token.")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = [i for i, kind in enumerate(types) if kind == TokenType.UNKNOWN]
    unknown_id = int(metadata.get("tokenizer.ggml.unknown_token_id", unknown[0] if unknown else 0))
    if not 0 <= unknown_id < len(tokens):
        raise ValueError(f"tokenizer.ggml.unknown_token_id is {unknown_id}, outside the {len(tokens)} tokens.")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges_from_scores(tokens, types, _plain_list(scores)),
            unk_token=tokens[unknown_id],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    blank = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), blank]) if prefix else blank
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def _merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece BPE joins the neighbours whose joint piece has the best score: the same order as a merge list.

    Pairs that give the same piece have the same score; the one whose left part ranks better comes first.
    """
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    rank = {token: i for i, token in enumerate(tokens) if types[i] in mergeable}
    merges: list[tuple[float, int, int, str, str]] = []
    for token, i in rank.items():
        if types[i] != TokenType.NORMAL:
            continue
        score = -float(scores[i])
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in rank and right in rank:
                merges.append((score, rank[left], rank[right], left, right))
    merges.sort()
    return [(left, right) for _, _, _, left, right in merges]


def _add_tokens(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    added = [
        (i, AddedToken(token, normalized=False, special=types[i] in special))
        for i, token in enumerate(tokens)
        if token and (types[i] in special or types[i] == TokenType.USER_DEFINED)
    ]
    tokenizer.add_tokens([token for _, token in added])
    for i, token in added:
        if tokenizer.token_to_id(token.content) != i:
            raise ValueError(f"tokenizer.ggml.tokens lists {token.content!r} twice: its id is not certain.")


def _model_size(types: Sequence[int]) -> int:
    """How many tokens the model itself holds: all but the control and user-defined ones at the end, which are added
    behind it, and the unused ones there, which nothing needs. Models that take a whole word as one token where the
    vocabulary has it (`ignore_merges`) must not find control tokens there."""
    size = len(types)
    while size and types[size - 1] in (TokenType.UNUSED, TokenType.CONTROL, TokenType.USER_DEFINED):
        size -= 1
    tail = types[size:]
    used = [i for i, kind in enumerate(tail) if kind != TokenType.UNUSED]
    if used and TokenType.UNUSED in tail[: used[-1]]:
        return size + used[-1] + 1  # a gap: ids of added tokens would shift, so all stay in the model
    return size


def _pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise ValueError(
            f"tokenizer.ggml.pre is {name!r}, which is not known; known are {', '.join(sorted(PRE_TOKENIZERS))}. "
            "Put the model's tokenizer.json beside it and name the folder instead."
        )
    return PRE_TOKENIZERS[name]


def _adds_bos(metadata: Mapping[str, Any], kind: str) -> bool:
    asked = metadata.get("tokenizer.ggml.add_bos_token")
    if asked is not None:
        return bool(asked)
    if kind in ("llama", "gemma4"):
        return True
    pre = _pre_tokenizer(metadata)
    return pre.adds_bos or pre.adds_sep


def _added_end(metadata: Mapping[str, Any], kind: str) -> int | None:
    """What stands behind a text: the end where the file says so, the separator where the family has one."""
    if metadata.get("tokenizer.ggml.add_eos_token"):
        return metadata.get("tokenizer.ggml.eos_token_id")
    if kind not in ("gpt2", "whitespace") or not (
        metadata.get("tokenizer.ggml.add_sep_token") or _pre_tokenizer(metadata).adds_sep
    ):
        return None
    for name in ("seperator", "separator", "eos"):  # the first is GGUF's own spelling
        if metadata.get(f"tokenizer.ggml.{name}_token_id") is not None:
            return int(metadata[f"tokenizer.ggml.{name}_token_id"])
    return None


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None or isinstance(tokens, str) or not len(tokens):
        raise ValueError("The GGUF file has no tokenizer.ggml.tokens: it holds no tokenizer.")
    # Bytes that are not UTF-8 came as lone surrogates, which the library cannot take.
    return [token if token.isprintable() else _valid(token) for token in tokens]


def _valid(token: str) -> str:
    return token.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _types(metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [TokenType.NORMAL] * count
    if len(types) != count:
        raise ValueError(f"tokenizer.ggml.token_type has {len(types)} entries for {count} tokens.")
    return _plain_list(types)


def _plain_list(values: Any) -> list[Any]:
    """Python numbers: looking at numpy's one by one is ten times slower."""
    return values.tolist() if hasattr(values, "tolist") else list(values)
