"""How rerankers that answer are asked about a pair of texts."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Question:
    """What such a model reads.

    Attributes:
        before, behind: text around a pair, control tokens among it.
        form: of the pair; `{query}` and `{document}` are the texts.
    """

    before: str
    form: str
    behind: str


QWEN3 = Question(
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. Note that "
    'the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n',
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: {query}\n"
    "<Document>: {document}",
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
)
"""Qwen3-Reranker's, as its authors publish it: the tokens of the three parts stand one behind the other."""
