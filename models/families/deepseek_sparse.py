"""DeepSeek-V3.2 (DeepSeek-AI 2025) and GLM-5 (Z.ai 2026): DeepSeek-V3 whose attention is sparse behind a lightning indexer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from models.api import Step
from models.config import ModelConfig, layer_kinds
from models.decoder import Decoder
from models.families.deepseek import DeepseekLayer, deepseek_v3_config
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
        x_TD, visited = self.mlp(x_TD, step, norm=self.mlp_norm, residual_TD=x_TD)
        return x_TD, kv, visited, chosen_TX


def build(config: ModelConfig, build: Build) -> Decoder:
    return Decoder(config, build, SparseLayer)


def _config(hf: Mapping[str, Any], chooses: Sequence[bool], interleaved: bool) -> ModelConfig:
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
    return _config(hf, [True] * hf["num_hidden_layers"], interleaved=False)


def glm_moe_dsa_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Which layers choose is said by layer, by a pattern of F and S, or by every how many layers do behind the first ones."""
    layers, kinds = hf["num_hidden_layers"], hf.get("indexer_types")
    if kinds is None and (pattern := hf.get("index_topk_pattern")) is not None:
        kinds = [{"F": "full", "S": "shared"}.get(str(kind), str(kind)) for kind in pattern]
    if kinds is None:
        every, first = max(hf.get("index_topk_freq") or 1, 1), hf.get("index_skip_topk_offset", 2)
        kinds = ["shared" if max(index - first + 1, 0) % every else "full" for index in range(layers)]
    kinds = layer_kinds(kinds, layers, ("full", "shared"), "indexer_types")
    return _config(hf, [kind == "full" for kind in kinds], interleaved=True)


def _one_more(hf: Mapping[str, Any]) -> dict[str, Any]:
    """With the layer that multi-token prediction adds, which has an indexer and experts."""
    layers = hf["num_hidden_layers"]
    more = {"mlp_layer_types": "sparse", "indexer_types": "full"}
    longer = {name: [*hf[name][:layers], kind] for name, kind in more.items() if hf.get(name)}
    return {**hf, **longer, "num_hidden_layers": layers + 1}


def deepseek_v32_mtp(hf: Mapping[str, Any]) -> MTP:
    return MTP(deepseek_v32_config(_one_more(hf)), SparseLayer, behind(hf["num_hidden_layers"]))


def glm_moe_dsa_mtp(hf: Mapping[str, Any]) -> MTP:
    layers = hf["num_hidden_layers"]
    known: Indexing = glm_moe_dsa_config(hf).get("indexing")
    kinds = ["full" if chooses else "shared" for chooses in known.chooses]
    return MTP(glm_moe_dsa_config(_one_more({**hf, "indexer_types": kinds})), SparseLayer, behind(layers))


FAMILIES = (
    Family("DeepSeek-V3.2", ("DeepseekV32ForCausalLM",), deepseek_v32_config, build, mtp=deepseek_v32_mtp),
    Family("GLM-5 (MoE)", ("GlmMoeDsaForCausalLM",), glm_moe_dsa_config, build, gguf=("glm-dsa",), mtp=glm_moe_dsa_mtp),
)
