"""An adapter of peft's as llama.cpp's converter writes it, for tests: names, rows and stacks as in a converted base."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

from models.loading.gguf.config import INTERLEAVED

ARCHITECTURES = {"LlamaForCausalLM": "llama", "MixtralForCausalLM": "llama", "Qwen3MoeForCausalLM": "qwen3moe"}


def write_gguf_adapter(adapter: Path, base: Path, out: Path) -> Path:
    """Writes `out`. Experts of `adapter` are one module each."""
    config = json.loads((base / "config.json").read_text())
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    arch = ARCHITECTURES[config["architectures"][0]]
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], config["num_hidden_layers"])
    writer = gguf.GGUFWriter(out, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name, array in load_file(adapter / "adapter_model.safetensors").items():
        module, _, half = name.removeprefix("base_model.model.").partition(".lora_")
        half = half.removesuffix(".weight").removeprefix("embedding_").lower()
        expert = re.search(r"\.experts\.(\d+)\.", module)
        own = table.get_name(re.sub(r"\.experts\.\d+\.", ".experts.", module) + ".weight", try_suffixes=(".weight",))
        assert own is not None, module
        if half == "b" and arch in INTERLEAVED and module.endswith(("q_proj", "k_proj")):
            heads = config["num_attention_heads" if module.endswith("q_proj") else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        if half == "a" and own == "token_embd.weight":
            array = array.T
        if expert is not None:
            stacks.setdefault(f"{own}.lora_{half}", {})[int(expert[1])] = array
        else:
            writer.add_tensor(f"{own}.lora_{half}", np.ascontiguousarray(array))
    for own, parts in stacks.items():
        writer.add_tensor(own, np.stack([parts[e] for e in range(len(parts))]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
