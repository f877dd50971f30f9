"""BERT-like encoders with a head that tells labels: rerankers such as MS MARCO MiniLM and BGE-reranker, whose one label says how
well two texts fit that are read as one (Nogueira & Cho 2019, arXiv:1901.04085), and classifiers of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.families.bert.bert import IGNORED_HEADS, Bert, bert_config, roberta_config
from models.family import Family
from models.label_head import with_labels
from models.layers import Build, Linear


class CrossEncoder(Bert):
    """`models.api.Classifier`: the first token's state through a dense layer, tanh, and a row of weights a label."""

    names: ClassVar[dict[str, str]] = Bert.names | {"dense": "pooler.dense", "head": "classifier"}

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        D = config.embed_dim
        self.dense = Linear(D, D, build, (None, "embed"), bias=True)
        self.head = Linear(D, len(config.get("labels")), build, (None, "embed"), bias=True)

    def classify(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """logit_BL float32 from what `encode` gave."""
        del length_B  # the first token's state is the text's, however long it is
        state_BD = jnp.tanh(self.dense(hidden_BSD[:, 0]))
        return self.head(state_BD, out_dtype=jnp.float32)


class RobertaCrossEncoder(CrossEncoder):
    """The same in RoBERTa's naming."""

    names: ClassVar[dict[str, str]] = Bert.names | {"dense": "classifier.dense", "head": "classifier.out_proj"}


def bert_classifier_config(hf: Mapping[str, Any]) -> ModelConfig:
    return with_labels(bert_config(hf), hf)


def roberta_classifier_config(hf: Mapping[str, Any]) -> ModelConfig:
    return with_labels(roberta_config(hf), hf)


FAMILIES = (
    Family(
        "BERT rerankers (MS MARCO MiniLM) and classifiers",
        ("BertForSequenceClassification",),
        bert_classifier_config,
        CrossEncoder,
        ignore=IGNORED_HEADS[1:],
        tasks=("classify", "score"),
    ),
    Family(
        "RoBERTa, XLM-R and CamemBERT rerankers (BGE-reranker) and classifiers",
        (
            "RobertaForSequenceClassification",
            "XLMRobertaForSequenceClassification",
            "CamembertForSequenceClassification",
        ),
        roberta_classifier_config,
        RobertaCrossEncoder,
        ignore=IGNORED_HEADS,
        tasks=("classify", "score"),
    ),
)
