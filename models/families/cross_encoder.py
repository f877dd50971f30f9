"""Cross-encoders: a BERT-like encoder reads two texts as one and a head says how well they fit (Nogueira & Cho 2019,
arXiv:1901.04085). Rerankers such as MS MARCO MiniLM and BGE-reranker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.families.bert import IGNORED_HEADS, Bert, bert_config, roberta_config
from models.family import Family
from models.layers import Build, Linear


class CrossEncoder(Bert):
    """`models.api.CrossEncoder`: the first token's state through a dense layer, tanh, and a row of weights."""

    names: ClassVar[dict[str, str]] = Bert.names | {"dense": "pooler.dense", "head": "classifier"}

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        D = config.embed_dim
        self.dense = Linear(D, D, build, (None, "embed"), bias=True)
        self.head = Linear(D, 1, build, (None, "embed"), bias=True)
        self.score_activation = config.get("score_activation")

    def score(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """score_B float32 from what `encode` gave."""
        del length_B  # the first token's state is the pair's, however long it is
        state_BD = jnp.tanh(self.dense(hidden_BSD[:, 0]))
        logit_B = self.head(state_BD, out_dtype=jnp.float32)[:, 0]
        return logit_B if self.score_activation == "identity" else jax.nn.sigmoid(logit_B)


class RobertaCrossEncoder(CrossEncoder):
    """The same in RoBERTa's naming."""

    names: ClassVar[dict[str, str]] = Bert.names | {"dense": "classifier.dense", "head": "classifier.out_proj"}


def one_label(config: ModelConfig) -> ModelConfig:
    """Refuses classifiers: their labels are no score.

    Raises:
        ValueError: the model has more than one label.
    """
    labels = config.get("num_labels")
    if labels != 1:
        raise ValueError(
            f"the model classifies into {labels} labels; of sequence classifiers, rerankers are served, which have one."
        )
    return config


def bert_reranker_config(hf: Mapping[str, Any]) -> ModelConfig:
    return one_label(bert_config(hf))


def roberta_reranker_config(hf: Mapping[str, Any]) -> ModelConfig:
    return one_label(roberta_config(hf))


FAMILIES = (
    Family(
        "BERT rerankers (MS MARCO MiniLM)",
        ("BertForSequenceClassification",),
        bert_reranker_config,
        CrossEncoder,
        ignore=IGNORED_HEADS[1:],
        tasks=("score",),
    ),
    Family(
        "RoBERTa and XLM-R rerankers (BGE-reranker)",
        ("RobertaForSequenceClassification", "XLMRobertaForSequenceClassification"),
        roberta_reranker_config,
        RobertaCrossEncoder,
        ignore=IGNORED_HEADS,
        tasks=("score",),
    ),
)
