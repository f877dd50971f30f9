"""GLM-5 (Z.ai 2026): DeepSeek-V3.2 in which some layers attend to what an earlier one has chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, layer_kinds
from models.families.deepseek.deepseek_sparse import SparseLayer, build, one_more, sparse_config
from models.family import Family
from models.heads.mtp import MTP, behind
from models.layers.indexer import Indexing


def glm_moe_dsa_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Which layers choose is said by layer, by a pattern of F and S, or by every how many layers do behind the first ones."""
    layers, kinds = hf["num_hidden_layers"], hf.get("indexer_types")
    if kinds is None and (pattern := hf.get("index_topk_pattern")) is not None:
        kinds = [{"F": "full", "S": "shared"}.get(str(kind), str(kind)) for kind in pattern]
    if kinds is None:
        every, first = max(hf.get("index_topk_freq") or 1, 1), hf.get("index_skip_topk_offset", 2)
        kinds = ["shared" if max(index - first + 1, 0) % every else "full" for index in range(layers)]
    kinds = layer_kinds(kinds, layers, ("full", "shared"), "indexer_types")
    return sparse_config(hf, [kind == "full" for kind in kinds], interleaved=True)


def glm_moe_dsa_mtp(hf: Mapping[str, Any]) -> MTP:
    layers = hf["num_hidden_layers"]
    known: Indexing = glm_moe_dsa_config(hf).get("indexing")
    kinds = ["full" if chooses else "shared" for chooses in known.chooses]
    return MTP(glm_moe_dsa_config(one_more({**hf, "indexer_types": kinds})), SparseLayer, behind(layers))


FAMILIES = (
    Family("GLM-5 (MoE)", ("GlmMoeDsaForCausalLM",), glm_moe_dsa_config, build, gguf=("glm-dsa",), mtp=glm_moe_dsa_mtp),
)
