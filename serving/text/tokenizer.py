"""Text to token ids and back, for any model whose vocabulary is in a tokenizer.json or in GGUF metadata.

Control tokens (`<|im_start|>`, `<bos>`, ...) steer a model, so who wrote them matters. `encode` takes them for text
unless told otherwise; for chats, `control_tokens.ControlTokenGuard` tells the ones that a template wrote from the ones
that a user typed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from serving.text import tokenizer_files
from serving.text.control_tokens import ControlTokenGuard, clean_unicode, sibling
from serving.text.formats import gguf_vocab
from serving.text.question import Question

SPACE_BYTES = gguf_vocab.SPACE.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte (Radford et al. 2019, `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


class Tokenizer:
    """A model's tokenizer. Immutable; safe to use from several threads at once.

    Attributes:
        vocab_size: the largest token id, plus one. The model's logits may be wider (padding).
        bos_token_id, bos_token, eos_token, unk_token, pad_token: None where the model has none. `eos_token` is the
            first of `eos_token_ids` as text.
        eos_token_ids: ids that end a completion, the model's own first.
        special_token_ids: control tokens: left out of decoded text by default, never read from a user's text.
        added_tokens: text -> id of every token that is matched as a whole before the vocabulary is looked at,
            control tokens and others.
        chat_templates: name -> Jinja source; the usual one is called "default". Empty for base models.
        strips_leading_space: the tokenizer puts a blank before a text, and takes it off again when decoding.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token: str | None = None,
        unk_token: str | None = None,
        pad_token: str | None = None,
        chat_templates: Mapping[str, str] | None = None,
        question: Question | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._parsing = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.added_tokens: dict[str, int] = {token.content: i for i, token in added.items()}
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_bytes = {i: token.content.encode() for i, token in added.items()}
        self._plain = sibling(tokenizer)
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_token_ids = tuple(dict.fromkeys(i for i in eos_token_ids if 0 <= i < self.vocab_size))
        self.bos_token = bos_token
        self.bos_token_id = tokenizer.token_to_id(bos_token) if bos_token else None
        self.eos_token = tokenizer.id_to_token(self.eos_token_ids[0]) if self.eos_token_ids else None
        self.unk_token = unk_token
        self.pad_token = pad_token
        self.chat_templates = dict(chat_templates or {})
        self._question = question
        self._form, self.strips_leading_space = _decoder_form(json.loads(_decoder_json(tokenizer)))
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_directory(
        cls, folder: str | Path, eos_token_ids: Iterable[int] | None = None, question: Question | None = None
    ) -> Tokenizer:
        """Reads a Hugging Face model folder: tokenizer.json, and beside it tokenizer_config.json,
        special_tokens_map.json, generation_config.json, config.json and chat templates where present.

        Args:
            eos_token_ids: instead of those that the files name.
            question: in which pairs of texts are put.
        Raises:
            ValueError: a file is missing or damaged; the sentence names it.
        """
        files = tokenizer_files.read(Path(folder))
        return cls(
            files.tokenizer,
            eos_token_ids=files.eos_token_ids if eos_token_ids is None else eos_token_ids,
            bos_token=files.bos_token,
            unk_token=files.unk_token,
            pad_token=files.pad_token,
            chat_templates=files.chat_templates,
            question=question,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Builds the tokenizer that a GGUF file's metadata describes.

        Args:
            metadata: GGUF key to plain Python value.
        Raises:
            ValueError: the metadata is incomplete, or of a kind that is not known.
        """
        tokenizer = gguf_vocab.build(metadata)
        text = {}
        for name in ("bos", "unknown", "padding"):
            token = metadata.get(f"tokenizer.ggml.{name}_token_id")
            text[name] = tokenizer.id_to_token(int(token)) if token is not None and int(token) >= 0 else None
        templates = {
            key.removeprefix("tokenizer.chat_template").lstrip(".") or "default": value
            for key, value in metadata.items()
            if (key == "tokenizer.chat_template" or key.startswith("tokenizer.chat_template."))
            and isinstance(value, str)
        }
        return cls(
            tokenizer,
            eos_token_ids=gguf_vocab.end_token_ids(metadata),
            bos_token=text["bos"],
            unk_token=text["unknown"],
            pad_token=text["padding"],
            chat_templates=templates,
        )

    @property
    def reads_text(self) -> bool:
        """False for the stand-in of a model without a tokenizer."""
        return True

    @property
    def hf(self) -> tokenizers.Tokenizer:
        """The library's object; control tokens in a text are parsed by it. Not to be changed."""
        return self._parsing

    def hf_json(self) -> str:
        """The tokenizer as the text of a tokenizer.json (tens of megabytes for large vocabularies)."""
        return self._parsing.to_str()

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            add_special_tokens: add what the model expects around a text (BOS).
            parse_special: take control tokens written in `text` for control tokens; else they are text.
        """
        tokenizer = self._parsing if parse_special else self._plain
        # As a batch of one, without offsets: it lets other threads run (`encode` does not, for 0.6 s of 260,000 characters) and
        # takes half the time.
        return tokenizer.encode_batch_fast([clean_unicode(text)], add_special_tokens=add_special_tokens)[0].ids

    def encode_pair(
        self, first: str, second: str | None = None, max_tokens: int | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and segment ids of one text, or of two as one sequence, with the model's special tokens around them.

        Control tokens written in the texts are text.

        Args:
            max_tokens: cut to this many, special tokens included: of two texts the longer one first, at its end.
        Raises:
            ValueError: `max_tokens` leaves no room for the special tokens and one token of each text.
        """
        if self._question is not None and second is not None:
            return self._asked(self._question, first, second, max_tokens)
        tokenizer = self._plain
        texts = [first] if second is None else [first, second]
        parts = tokenizer.encode_batch([clean_unicode(text) for text in texts], add_special_tokens=False)
        if max_tokens is not None:
            room = max_tokens - tokenizer.num_special_tokens_to_add(second is not None)
            if room < len(parts):
                raise ValueError(
                    f"At most {max_tokens} tokens were asked for; the special tokens around the text alone are "
                    f"{max_tokens - room}."
                )
            for part, length in zip(parts, _longest_first([len(part.ids) for part in parts], room), strict=True):
                part.truncate(length)
        encoding = tokenizer.post_process(parts[0], parts[1] if second is not None else None)
        return encoding.ids, encoding.type_ids

    def _asked(
        self, question: Question, first: str, second: str, max_tokens: int | None
    ) -> tuple[list[int], list[int]]:
        """A pair as the question of a model that answers. What is cut is the end of the document."""
        before, behind = (self.encode(text, False, parse_special=True) for text in (question.before, question.behind))
        ids = self.encode(question.form.format(query=first, document=second), add_special_tokens=False)
        if max_tokens is not None:
            room = max_tokens - len(before) - len(behind)
            if room < 1:
                raise ValueError(
                    f"At most {max_tokens} tokens were asked for; the question around the texts alone is {max_tokens - room}."
                )
            ids = ids[:room]
        ids = [*before, *ids, *behind]
        return ids, [0] * len(ids)

    def chat_guard(self, template_source: str = "") -> ControlTokenGuard:
        """What keeps users' text from becoming control tokens in chats rendered with this template."""
        return ControlTokenGuard(self._parsing, template_source)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token are skipped."""
        raw = b"".join(self._pieces(ids, skip_special_tokens))
        if self.strips_leading_space and raw[:1] == b" ":
            raw = raw[1:]
        return raw.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to a text: empty for ids without a token, its name for a control token.

        Joined over a sequence they are the UTF-8 text (with one blank in front where `strips_leading_space`).
        """
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._make_bytes(token_id)
        return known

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling (`Ġthe`, `▁the`), or None for an id without a token."""
        return self._parsing.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None

    def token_to_id(self, token: str) -> int | None:
        """The id of the vocabulary's own spelling of a token, or None."""
        return self._parsing.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token."""
        return token_id in self.special_token_ids

    def _pieces(self, ids: Iterable[int], skip_special_tokens: bool) -> list[bytes]:
        if skip_special_tokens:
            return [self.token_bytes(i) for i in ids if i not in self.special_token_ids]
        return [self.token_bytes(i) for i in ids]

    def _make_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_bytes:
            added = self._added_bytes[token_id]
            # Gemma's runs of blanks are added tokens, spelt as in the vocabulary.
            return added.replace(SPACE_BYTES, b" ") if self._form == "sentencepiece" else added
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self._form == "byte_level":
            try:
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            except KeyError:
                return token.encode()
        if self._form == "sentencepiece":
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                try:
                    return bytes([int(token[3:5], 16)])
                except ValueError:
                    pass
            return token.encode().replace(SPACE_BYTES, b" ")
        if self._form == "wordpiece":
            return token[2:].encode() if token.startswith("##") else b" " + token.encode()
        return token.encode()


def _longest_first(lengths: list[int], room: int) -> list[int]:
    """Lengths of one or two texts that sum to at most `room`: the longer is cut, and once they are equal both."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first = min(lengths[0], max(room - lengths[1], room - room // 2))
    return [first, min(lengths[1], room - first)]


def _decoder_json(tokenizer: tokenizers.Tokenizer) -> str:
    """The decoder's part of the tokenizer.json, without writing the vocabulary."""
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    if tokenizer.decoder is not None:
        empty.decoder = tokenizer.decoder
    return empty.to_str()


def _decoder_form(data: Mapping[str, Any]) -> tuple[str, bool]:
    """(how tokens spell bytes, whether a leading blank is taken off), from the decoder of a tokenizer.json."""
    decoder = data.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type"): step for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level", False
    if "WordPiece" in kinds:
        return "wordpiece", True
    if "Metaspace" in kinds:
        return "sentencepiece", kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds or "Replace" in kinds:
        strip = kinds.get("Strip", {})
        return "sentencepiece", strip.get("content") == " " and strip.get("start", 0) > 0
    return "plain", False
