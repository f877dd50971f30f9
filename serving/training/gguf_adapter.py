"""An adapter as a GGUF file, as llama.cpp's converter writes it: the base's tensor names with `.lora_a` and `.lora_b` behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from models.loading.gguf_checkpoint import GGUFCheckpoint
from models.loading.gguf_config import rotated_pairs
from models.loading.opening import Opened
from serving.training.lora import LoraSettings


def write_gguf(
    path: Path, pairs: Mapping[str, Mapping[str, np.ndarray]], settings: LoraSettings, opened: Opened
) -> None:
    """Writes the file, in float32.

    Args:
        pairs: as `export.write_peft`.
    Raises:
        ValueError: an architecture that GGUF does not have, or a tensor that it keeps in another form.
    """
    arch, layers = architecture(opened), int(opened.hf_config.get("num_hidden_layers") or opened.hf_config["n_layer"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    heads = rotated_pairs(opened.hf_config, arch)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp divides it by the rank.
    writer.add_float32("adapter.lora.alpha", settings.scale * settings.rank)
    for name, pair in pairs.items():
        own = table.get_name(name, try_suffixes=(".weight",))
        if own is None or ".kv_b_proj." in name:
            raise ValueError(f"--gguf: {name} is kept in another form there: leave it out of --lora-targets.")
        b_Or = np.ascontiguousarray(pair["b"], np.float32)
        if heads is not None and (".q_proj." in name or ".k_proj." in name):
            b_Or = interleaved_rows(b_Or, heads[0] if ".q_proj." in name else heads[1])
        writer.add_tensor(f"{own}.lora_a", np.ascontiguousarray(pair["a"], np.float32))
        writer.add_tensor(f"{own}.lora_b", np.ascontiguousarray(b_Or))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture(opened: Opened) -> str:
    """`general.architecture` of the base's GGUF files.

    Raises:
        ValueError: there is none.
    """
    if isinstance(opened.checkpoint, GGUFCheckpoint):
        return str(opened.checkpoint.file.metadata["general.architecture"])
    if not opened.family.gguf:
        raise ValueError(f"--gguf: {opened.family.name} has no GGUF form.")
    return opened.family.gguf[0].split()[0]


def interleaved_rows(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's rotary pairs (i, i + h / 2) as (2i, 2i + 1): `gguf_checkpoint.half_split_rows` backwards."""
    rest = rows.shape[1:]
    return rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(rows.shape)
