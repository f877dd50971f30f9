"""How a model reads prompts and writes answers: the served one, and adapters that were trained with another template or tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.service.requests.chat_style import ChatStyle

if TYPE_CHECKING:
    from serving.text.chat_template import ChatTemplate
    from serving.text.grammar import GrammarCompiler
    from serving.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Voice:
    """What stands between text and a model's tokens.

    Attributes:
        tokenizer, chat_template, grammar_compiler: as for `TextService`.
        style: how it writes tool calls and thinking.
    """

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    style: ChatStyle
    grammar_compiler: GrammarCompiler | None


def voice_of_adapter(folder: Path, base: Voice, vocab_size: int) -> Voice | None:
    """The voice of an adapter whose folder has a tokenizer or a chat template that differ from the base's; None where it speaks
    as the base does. Where it has the base's tokens, its own end of a turn comes before the base's, which end one too.

    Args:
        vocab_size: of the served model's logits.
    Raises:
        ValueError: a file that cannot be read, or tokens that the served model has no row for.
    """
    from serving.text import tokenizer_files
    from serving.text.chat_template import ChatTemplate
    from serving.text.tokenizer import Tokenizer

    if not base.tokenizer.reads_text or not folder.is_dir():
        return None
    tokenizer, templates = base.tokenizer, tokenizer_files.chat_templates(folder)
    if tokenizer_files.has_vocabulary(folder):
        own = Tokenizer.from_directory(folder)
        if own.vocab_size > vocab_size:
            raise ValueError(
                f"{folder} has a tokenizer of {own.vocab_size} tokens; the served model has rows for {vocab_size}."
            )
        same = _vocabulary(own) == _vocabulary(tokenizer)
        ends = tuple(dict.fromkeys((*own.eos_token_ids, *(tokenizer.eos_token_ids if same else ()))))
        if not same or set(ends) != set(tokenizer.eos_token_ids):
            tokenizer = Tokenizer.from_directory(folder, eos_token_ids=ends)
    source = templates.get("default") or next(iter(templates.values()), None)
    template = base.chat_template
    if source is not None and (template is None or source != template.source or tokenizer is not base.tokenizer):
        template = ChatTemplate(source, tokenizer, tool_source=templates.get("tool_use"))
    elif template is not None and tokenizer is not base.tokenizer:
        template = ChatTemplate(template.source, tokenizer)
    if tokenizer is base.tokenizer and template is base.chat_template:
        return None
    compiler: Any = base.grammar_compiler
    if compiler is not None and tokenizer is not base.tokenizer:
        compiler = type(compiler)(tokenizer, vocab_size)
    return Voice(tokenizer, template, ChatStyle.of(template, tokenizer), compiler)


def _vocabulary(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.hf.get_vocab(with_added_tokens=True)
