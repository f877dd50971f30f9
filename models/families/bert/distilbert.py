"""DistilBERT (Sanh et al. 2019, arXiv:1910.01108): BERT's network without segments, with half of its layers; its classifiers have
a ReLU in their head where BERT's have a tanh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.families.bert.bert import Bert, EncoderLayer, SelfAttention, bert_config
from models.family import Family
from models.label_head import with_labels
from models.layers import Build, Linear


class DistilBertAttention(SelfAttention):
    names: ClassVar[tuple[str, ...]] = ("q_lin", "k_lin", "v_lin", "out_lin")


class DistilBertLayer(EncoderLayer):
    names: ClassVar[dict[str, str]] = {
        "attn": "attention",
        "attn_norm": "sa_layer_norm",
        "up": "ffn.lin1",
        "down": "ffn.lin2",
        "mlp_norm": "output_layer_norm",
    }
    attention: ClassVar[type[SelfAttention]] = DistilBertAttention


class DistilBert(Bert):
    """`models.api.Encoder`; a pair is read as one text."""

    layer: ClassVar[type[EncoderLayer]] = DistilBertLayer
    layer_name: ClassVar[str] = "transformer.layer"


class DistilBertClassifier(DistilBert):
    """`models.api.Classifier`: the first token's state through a dense layer, ReLU, and a row of weights a label."""

    names: ClassVar[dict[str, str]] = DistilBert.names | {"dense": "pre_classifier", "head": "classifier"}

    def __init__(self, config: ModelConfig, build: Build):
        super().__init__(config, build)
        D = config.embed_dim
        self.dense = Linear(D, D, build, (None, "embed"), bias=True)
        self.head = Linear(D, len(config.get("labels")), build, (None, "embed"), bias=True)

    def classify(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """logit_BL float32 from what `encode` gave."""
        del length_B  # the first token's state is the text's, however long it is
        return self.head(jax.nn.relu(self.dense(hidden_BSD[:, 0])), out_dtype=jnp.float32)


def distilbert_config(hf: Mapping[str, Any]) -> ModelConfig:
    """The file's names are the family's own. Its sinusoidal positions are in the checkpoint as any others."""
    plain = {
        "hidden_size": hf["dim"],
        "num_hidden_layers": hf["n_layers"],
        "num_attention_heads": hf["n_heads"],
        "intermediate_size": hf["hidden_dim"],
        "hidden_act": hf.get("activation", "gelu"),
        "type_vocab_size": 0,
    }
    return bert_config({**hf, **plain})


def distilbert_classifier_config(hf: Mapping[str, Any]) -> ModelConfig:
    return with_labels(distilbert_config(hf), hf)


FAMILIES = (
    Family(
        "DistilBERT encoders",
        ("DistilBertModel", "DistilBertForMaskedLM"),
        distilbert_config,
        DistilBert,
        ignore=(r"^vocab_(transform|layer_norm|projector)\.",),
        tasks=("embed",),
    ),
    Family(
        "DistilBERT classifiers and rerankers",
        ("DistilBertForSequenceClassification",),
        distilbert_classifier_config,
        DistilBertClassifier,
        tasks=("classify", "score"),
    ),
)
