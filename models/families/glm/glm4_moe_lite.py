"""GLM-4.7 Flash (Z.ai 2026): DeepSeek-V3 that says of each layer whether it has experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig, layer_kinds, partial_rotary, refuse_part
from models.families.deepseek.deepseek import DeepseekLayer, build, deepseek_v3_config
from models.family import Family
from models.heads.mtp import MTP, behind


def glm4_moe_lite_config(hf: Mapping[str, Any]) -> ModelConfig:
    layers = hf["num_hidden_layers"]
    refuse_part(partial_rotary(hf), hf["qk_rope_head_dim"])
    kinds = hf.get("mlp_layer_types") or ["dense"] + ["sparse"] * (layers - 1)
    kinds = layer_kinds(kinds, layers, ("dense", "sparse"), "mlp_layer_types")
    hf = {**hf, "n_group": hf.get("n_group") or 1, "topk_group": hf.get("topk_group") or 1}
    config = deepseek_v3_config(hf)
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, layers=tuple(kind == "sparse" for kind in kinds))
    return dataclasses.replace(config, moe=moe)


def glm4_moe_lite_mtp(hf: Mapping[str, Any]) -> MTP:
    layers = hf["num_hidden_layers"]
    kinds = hf.get("mlp_layer_types")
    more = {} if kinds is None else {"mlp_layer_types": [*kinds[:layers], "sparse"]}
    return MTP(glm4_moe_lite_config({**hf, **more, "num_hidden_layers": layers + 1}), DeepseekLayer, behind(layers))


FAMILIES = (
    Family("GLM-4.7 Flash (MoE)", ("Glm4MoeLiteForCausalLM",), glm4_moe_lite_config, build, mtp=glm4_moe_lite_mtp),
)
