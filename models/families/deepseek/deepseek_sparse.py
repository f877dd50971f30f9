"""DeepSeek-V3.2 (DeepSeek-AI 2025): DeepSeek-V3 whose attention is sparse behind a lightning indexer. GLM-5 is another."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from models.api import Step
from models.config import ModelConfig, layer_kinds
from models.decoder import Decoder
from models.families.deepseek.deepseek import DeepseekLayer, deepseek_v3_config
from models.family import Family
from models.heads.mtp import MTP, behind
from models.layers import Build
from models.layers.indexer import IndexedLatentAttention, Indexing


class SparseLayer(DeepseekLayer):
    def make_attention(self, config: ModelConfig, index: int, build: Build) -> IndexedLatentAttention:
        return IndexedLatentAttention(config, index, build, config.get("indexing"))

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x_TD: jax.Array, step: Step, kv: Any, chosen_TX: jax.Array | None = None
    ) -> tuple[jax.Array, Any, tuple[jax.Array, ...], jax.Array | None]:
        """As `Layer`, handing on which positions were attended to."""
        x_TD, kv, chosen_TX = self.attn(x_TD, step, kv, norm=self.attn_norm, residual_TD=x_TD, chosen_TX=chosen_TX)
        x_TD = step.asked(x_TD)
        x_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, kv, visited, chosen_TX


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, SparseLayer)


def sparse_config(hf: Mapping[str, Any], chooses: Sequence[bool], interleaved: bool) -> ModelConfig:
    """Of all networks with such indexers.

    Args:
        chooses: by layer, whether it has one; the others attend to what the last one before has chosen.
        interleaved: as `Indexing` has it.
    """
    layers = hf["num_hidden_layers"]
    dense = min(hf.get("first_k_dense_replace", 3), layers)
    kinds = hf.get("mlp_layer_types") or ["dense"] * dense + ["sparse"] * (layers - dense)
    kinds = layer_kinds(kinds, layers, ("dense", "sparse"), "mlp_layer_types")
    config = deepseek_v3_config({**hf, "rope_interleave": True})
    assert config.moe is not None
    if config.mla is None or config.mla.q_rank is None:
        raise ValueError("config.json has no 'q_lora_rank': index queries are made of compressed ones.")
    indexing = Indexing(hf["index_n_heads"], hf["index_head_dim"], hf["index_topk"], interleaved, tuple(chooses))
    return dataclasses.replace(
        config,
        moe=dataclasses.replace(config.moe, layers=tuple(kind == "sparse" for kind in kinds)),
        extra=(*config.extra, ("indexing", indexing)),
    )


def deepseek_v32_config(hf: Mapping[str, Any]) -> ModelConfig:
    return sparse_config(hf, [True] * hf["num_hidden_layers"], interleaved=False)


def one_more(hf: Mapping[str, Any]) -> dict[str, Any]:
    """With the layer that multi-token prediction adds, which has an indexer and experts."""
    layers = hf["num_hidden_layers"]
    more = {"mlp_layer_types": "sparse", "indexer_types": "full"}
    longer = {name: [*hf[name][:layers], kind] for name, kind in more.items() if hf.get(name)}
    return {**hf, **longer, "num_hidden_layers": layers + 1}


def deepseek_v32_mtp(hf: Mapping[str, Any]) -> MTP:
    return MTP(deepseek_v32_config(one_more(hf)), SparseLayer, behind(hf["num_hidden_layers"]))


FAMILIES = (Family("DeepSeek-V3.2", ("DeepseekV32ForCausalLM",), deepseek_v32_config, build, mtp=deepseek_v32_mtp),)
