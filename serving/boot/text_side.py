"""The parts of a model that deal with text, read without its weights."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.loading.source import ModelSource
    from serving.text.chat_template import ChatTemplate
    from serving.text.question import Question
    from serving.text.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tekken.json", "tiktoken.model", "qwen.tiktoken", "vocab.json", "vocab.txt",
    "tokenizer_config.json",
)  # fmt: skip
"""A folder with one of these means to have a tokenizer."""


@dataclasses.dataclass(frozen=True)
class TextSide:
    """What reads prompts and writes answers. `tokenizer.reads_text` is False for a model without one."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


def load_text_side(source: ModelSource, chat_template: str | None = None) -> TextSide:
    """Reads a model's tokenizer and chat template; no weights. A checkpoint that has no tokenizer at all serves token ids.

    Args:
        chat_template: a file, or Jinja text, instead of the model's own.
    Raises:
        ValueError: the tokenizer or the template cannot be used.
    """
    from serving.text.chat_template import ChatTemplate
    from serving.text.token_ids_only import TokenIdsOnly
    from serving.text.tokenizer import Tokenizer

    if source.kind == "gguf":
        from models.loading.gguf.file import open_gguf

        metadata = open_gguf(source.path).metadata
        if metadata.get("tokenizer.ggml.model", "none") in ("none", "no_vocab"):
            return TextSide(TokenIdsOnly(_ends(metadata.get("tokenizer.ggml.eos_token_id"))), None)
        tokenizer = Tokenizer.from_gguf(metadata)
    elif not any((source.path / name).exists() for name in TOKENIZER_FILES):
        return TextSide(TokenIdsOnly(_recorded_ends(source.path)), None)
    else:
        tokenizer = Tokenizer.from_directory(source.path, question=_question(source))
    template = read_template(chat_template) if chat_template is not None else None
    return TextSide(tokenizer, ChatTemplate.from_tokenizer(tokenizer, template))


def _question(source: ModelSource) -> Question | None:
    """How a reranker that answers is asked; None for any other model."""
    from models.loading.answers import words_of
    from models.loading.hf_config import read_json
    from serving.text.question import QWEN3

    if not (source.path / "config.json").is_file():
        return None
    return None if words_of(read_json(source.path / "config.json"), source.name or source.path.name) is None else QWEN3


def _recorded_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a completion, as generation_config.json or config.json say."""
    from models.loading.hf_config import read_json

    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file() and (found := _ends(read_json(folder / name).get("eos_token_id"))):
            return found
    return ()


def _ends(value: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in (value if isinstance(value, list) else [value]) if isinstance(i, int))


def read_template(given: str) -> str:
    """The Jinja text that `--chat-template` names or is.

    Raises:
        ValueError: it is neither a file nor looks like a template.
    """
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"chat_template {given}: cannot be read as a file ({reason}).") from None


class InThread:
    """A function's result, computed in a daemon thread: an interrupted start-up does not wait for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True, name="jaxserve-text-side")
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._value = function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
