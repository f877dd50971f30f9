"""Byte-pair vocabularies that are lists of byte strings by rank (tiktoken's kind), as the library's BPE with merges.

tiktoken joins the neighbours whose joint bytes have the lowest rank. The same order as a list of merges: for every
token, by rank, the pairs of tokens that make it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

MAX_TOKEN_BYTES = 1024


def _alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


_CHAR_OF_BYTE = dict(enumerate(_alphabet()))


def spelt(token: bytes) -> str:
    """A token's bytes in the library's printable spelling."""
    return token.decode("latin-1").translate(_CHAR_OF_BYTE)


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[str, str]]:
    """The merges that join what the ranks join, in their order.

    Args:
        ranks: token -> rank, all 256 single bytes among them.
    """
    found: list[tuple[int, int, int]] = []
    of_rank = {rank: token for token, rank in ranks.items()}
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left = ranks.get(token[:cut])
            if left is not None and (right := ranks.get(token[cut:])) is not None:
                found.append((rank, left, right))
    found.sort()
    text = {rank: spelt(token) for rank, token in of_rank.items()}
    return [(text[left], text[right]) for _, left, right in found]


def build(
    ranks: Mapping[bytes, int],
    pattern: str | Iterable[str],
    first_id: int = 0,
    nfc: bool = False,
    before: Mapping[str, int] | None = None,
) -> Tokenizer:
    """The tokenizer of a ranked vocabulary, without its special tokens.

    Args:
        pattern: how text is cut into words first; of several, each cuts what the one before left.
        first_id: the id of rank 0.
        before: special tokens with smaller ids, which the model must hold before they are added by name.
    Raises:
        ValueError: a single byte is missing, or a token is too long.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 single bytes, so not every text has tokens.")
    if max(map(len, ranks)) > MAX_TOKEN_BYTES:
        raise ValueError(f"a token has more than {MAX_TOKEN_BYTES} bytes.")
    vocab = {**{spelt(token): rank + first_id for token, rank in ranks.items()}, **(before or {})}
    # A word that is a token is one token, whatever merges lead to it: tiktoken looks it up first.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges_of(ranks), ignore_merges=True))
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    splits = [pre_tokenizers.Split(Regex(each), "isolated") for each in patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def add_specials(tokenizer: Tokenizer, specials: Mapping[str, int], plain: Iterable[str] = ()) -> None:
    """Adds special tokens at their ids.

    Args:
        plain: those of them that are no control tokens.
    Raises:
        ValueError: an id is not the one that the token would get.
    """
    others = set(plain)
    ordered = sorted(specials.items(), key=lambda item: item[1])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=text not in others) for text, _ in ordered])
    for text, token in ordered:
        if tokenizer.token_to_id(text) != token:
            raise ValueError(f"the special token {text!r} has the id {token}, which is taken or leaves a gap.")
