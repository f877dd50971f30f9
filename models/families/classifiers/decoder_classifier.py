"""Decoders with a head that tells labels in place of the one that tells tokens, as transformers' `…ForSequenceClassification` and
TRL's reward models have it: the last token, which has read all others, through a row of weights a label. Of rerankers that answer
(`models/loading/answers.py`) that row is the difference of two of the tokens'.

They generate nothing, so they run as encoders do: whole texts in one batch, and no pages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import CausalLM, Step
from models.config import ModelConfig
from models.families import exaone4, phi3, seed_oss, smollm3, starcoder2
from models.families.deepseek import deepseek
from models.families.gemma import gemma
from models.families.gpt import gpt2, gpt_oss
from models.families.llama import llama
from models.families.mistral import mistral, mixtral
from models.families.olmo import olmo2
from models.families.qwen import qwen2, qwen3, qwen_moe
from models.family import Family
from models.label_head import with_labels
from models.layers import Build, Linear
from models.pooling import pool
from models.recipes import Computed, Piece, Recipe, Recipes, Rows, under
from ops.paged_attention import Sequences

_MODULES = (
    deepseek, exaone4, gemma, gpt2, gpt_oss, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen_moe, seed_oss, smollm3,
    starcoder2,
)  # fmt: skip
_ENDINGS = ("ForCausalLM", "LMHeadModel")
_ENDING = "ForSequenceClassification"
_OTHER_NAMES = {"Gemma3ForCausalLM": "Gemma3Text"}
"""Of an architecture whose classifier transformers calls otherwise; the plain name is that of the one with images."""
_WITHOUT = ("OlmoeForCausalLM",)
"""Those of which transformers has no classifier."""


class DecoderClassifier(nnx.Module):
    """`models.api.Classifier` around a decoder.

    Args:
        build_decoder: (config, build) -> the decoder, a `models.api.CausalLM`.
    """

    def __init__(self, build_decoder: Callable[[ModelConfig, Build], Any], config: ModelConfig, build: Build):
        self.config = config
        self.decoder = build_decoder(config, build)
        self.head = Linear(config.embed_dim, len(config.get("labels")), build, (None, "embed"))

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def encode(self, tokens_BS: jax.Array, length_B: jax.Array, segments_BS: jax.Array | None = None) -> jax.Array:
        """hidden_BSD of B texts of length_B tokens, padded behind their ends (arbitrary there); every token sees those before it,
        and a pair is read as one text."""
        del length_B, segments_BS  # no token sees the padding, which is behind all
        B, S = tokens_BS.shape
        positions_BS = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        attention = Sequences(jnp.ones_like(tokens_BS), positions_BS, single=True)
        step = Step(tokens_BS.reshape(-1), positions_BS.reshape(-1), cast(Any, attention))
        decoder = cast(CausalLM, self.decoder)
        return decoder.forward(step, (None,) * len(decoder.kv_specs())).hidden_TD.reshape(B, S, -1)

    def classify(self, hidden_BSD: jax.Array, length_B: jax.Array) -> jax.Array:
        """logit_BL float32 from what `encode` gave."""
        return self.head(pool(hidden_BSD, length_B, "last", normalize=False), out_dtype=jnp.float32)

    def recipes(self) -> Recipes:
        answers = self.config.get("answers")
        head = self.head.recipes("score") if answers is None else {"weight": _answered(*answers)}
        return under("decoder", self.decoder.recipes()) | under("head", head)


def _answered(tensor: str, rows: int, width: int, against: int, inside: int) -> Recipe:
    """The row [1, width] whose product is the logit of one token less that of another."""
    table = Piece(tensor, (rows, width))
    return Computed((Rows(table, inside, inside + 1), Rows(table, against, against + 1)), np.subtract)


def classifier_of(family: Family) -> Family | None:
    """The family of a family's classifiers; None where transformers has none."""
    bases = {
        _OTHER_NAMES.get(name, name.removesuffix(ending)) + _ENDING: name
        for name in family.architectures
        for ending in _ENDINGS
        if name.endswith(ending) and name not in _WITHOUT
    }
    if not bases:
        return None

    def config(hf: Mapping[str, Any]) -> ModelConfig:
        name = hf["architectures"][0]
        plain = family.config({**hf, "architectures": [bases[name]], "tie_word_embeddings": True})
        config = with_labels(dataclasses.replace(plain, architecture=name, tie_embeddings=True), hf)
        if "answers" not in hf:
            return config
        table = "model.embed_tokens.weight" if hf.get("tie_word_embeddings") else "lm_head.weight"
        answers = (table, config.vocab_size, config.embed_dim, *hf["answers"])
        return dataclasses.replace(config, extra=(*config.extra, ("answers", answers)))

    def build(config: ModelConfig, build: Build) -> DecoderClassifier:
        return DecoderClassifier(family.build, config, build)

    title = f"{family.name}: classifiers, rerankers and reward models"
    return Family(
        title, tuple(bases), config, build, ignore=family.ignore, tasks=("classify", "score"), by_layer=family.by_layer
    )


FAMILIES = tuple(
    found for module in _MODULES for family in module.FAMILIES if (found := classifier_of(family)) is not None
)
