"""GGUF files that come out of training: an adapter, as llama.cpp's converter writes it (the base's tensor names with `.lora_a` and
`.lora_b` behind), and a GGUF base with an adapter in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models.loading.gguf.checkpoint import GGUFCheckpoint
from models.loading.gguf.config import rotated_pairs
from models.loading.opening import Opened
from serving.training.lora import LoraSettings

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
    "float16": gguf.GGMLQuantizationType.F16,
}

_MADE_ANEW = ("GGUF.", "split.", "general.architecture", "general.file_type")
"""Keys that the writer has, or that are not true of the new file."""


def write_gguf(
    path: Path, pairs: Mapping[str, Mapping[str, np.ndarray]], settings: LoraSettings, opened: Opened
) -> None:
    """Writes the file, in float32.

    Args:
        pairs: as `export.write_peft`.
    Raises:
        ValueError: an architecture that GGUF does not have, or a tensor that it keeps in another form.
    """
    writer = gguf.GGUFWriter(path, architecture(opened))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp divides it by the rank.
    writer.add_float32("adapter.lora.alpha", settings.scale * settings.rank)
    for own, a_rI, b_Or in in_gguf(pairs, opened):
        writer.add_tensor(f"{own}.lora_a", a_rI)
        writer.add_tensor(f"{own}.lora_b", b_Or)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def in_gguf(
    pairs: Mapping[str, Mapping[str, np.ndarray]], opened: Opened
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(GGUF's name of the tensor, A [r, I], B [O, r] in its order of rows) of each pair, float32.

    Raises:
        ValueError: an architecture that GGUF does not have, or a tensor that it keeps in another form.
    """
    arch, layers = architecture(opened), int(opened.hf_config.get("num_hidden_layers") or opened.hf_config["n_layer"])
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(kinds[arch], layers)
    heads = rotated_pairs(opened.hf_config, arch)
    for name, pair in pairs.items():
        own = table.get_name(name, try_suffixes=(".weight",))
        if own is None or ".kv_b_proj." in name:
            raise ValueError(f"--gguf: {name} is kept in another form there: leave it out of --lora-targets.")
        b_Or = np.ascontiguousarray(pair["b"], np.float32)
        if heads is not None and (".q_proj." in name or ".k_proj." in name):
            b_Or = interleaved_rows(b_Or, heads[0] if ".q_proj." in name else heads[1])
        yield own, np.ascontiguousarray(pair["a"], np.float32), np.ascontiguousarray(b_Or)


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
    """Each head's rotary pairs (i, i + h / 2) as (2i, 2i + 1): `models.loading.gguf.checkpoint.half_split_rows` backwards."""
    rest = rows.shape[1:]
    return rows.reshape(heads, 2, -1, *rest).swapaxes(1, 2).reshape(rows.shape)


def has_gguf_base(opened: Opened) -> bool:
    """Whether the base is one GGUF file."""
    return (
        isinstance(opened.checkpoint, GGUFCheckpoint)
        and int(opened.checkpoint.file.metadata.get("split.count", 1)) <= 1
    )


def write_merged_gguf(
    path: Path, pairs: Mapping[str, Mapping[str, np.ndarray]], settings: LoraSettings, opened: Opened, dtype: str
) -> int:
    """Writes the file; returns how many tensors were changed.

    Args:
        pairs: as `export.write_peft`.
        opened: a base that `has_gguf_base`.
        dtype: of the tensors that are changed; others stay as they are stored.
    Raises:
        ValueError: a pair of a tensor that GGUF keeps in another form.
    """
    assert isinstance(opened.checkpoint, GGUFCheckpoint)
    reader = gguf.GGUFReader(opened.checkpoint.file.path)
    changes = {own: (a_rI, b_Or) for own, a_rI, b_Or in in_gguf(pairs, opened)}
    writer = gguf.GGUFWriter(path, str(opened.checkpoint.file.metadata["general.architecture"]), use_temp_file=True)
    for field in reader.fields.values():
        if not field.name.startswith(_MADE_ANEW):
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=sub)
    changed = 0
    for tensor in reader.tensors:
        change: Any = changes.get(tensor.name)
        if change is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        a_rI, b_Or = change
        values_OI = gguf.quants.dequantize(tensor.data, tensor.tensor_type) + settings.scale * (b_Or @ a_rI)
        stored = gguf.quants.quantize(values_OI.astype(np.float32), TYPES[dtype])
        writer.add_tensor(tensor.name, stored, raw_dtype=TYPES[dtype])
        changed += 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return changed
