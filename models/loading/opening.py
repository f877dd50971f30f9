"""A checkpoint's headers: its configuration, its family and where its tensors are; nothing of its weights is read yet."""

from __future__ import annotations

import dataclasses
from typing import Any

from models import registry
from models.embedding_head import EmbeddingHead, embedding_head
from models.family import Family
from models.loading import hf_config, orbax
from models.loading.answers import as_classifier
from models.loading.default_model import MODEL_ID, RECORDED_NAME
from models.loading.files.checkpoint import Checkpoint
from models.loading.files.experts import ExpertLayouts
from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.gguf import config as gguf_config
from models.loading.gguf.checkpoint import GGUFCheckpoint
from models.loading.gguf.file import open_gguf
from models.loading.hf_config import read_json
from models.loading.quantized import open_quantized, refuse_packed
from models.loading.source import ModelSource


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers have been read."""

    source: ModelSource
    family: Family
    hf_config: dict[str, Any]
    checkpoint: Checkpoint | None  # None: Orbax restores parameters, not tensors
    model_id: str
    generation_config: dict[str, Any]
    embedding: EmbeddingHead  # how embeddings are made
    tower: Checkpoint | None = None  # where the tower's tensors are; None: beside the others


def open_checkpoint(source: ModelSource) -> Opened:
    """Reads a checkpoint's configuration and headers, and finds its family."""
    if source.kind == "gguf":
        return _open_gguf(source)
    if source.kind == "hf":
        return _open_hf(source)
    hf = read_json(source.path / "config.json")
    generation = read_json(source.path / "generation_config.json")
    manifest = orbax.read_manifest(source.path)
    family = registry.find(hf["architectures"][0])
    head = embedding_head(source.path, _pooling(family))
    return Opened(source, family, hf, None, manifest["model_id"], generation, head)


def _pooling(family: Family) -> str:
    """Where nothing says it: a decoder's last token has read all others."""
    return "last" if "generate" in family.tasks else "mean"


def _open_gguf(source: ModelSource) -> Opened:
    file = open_gguf(source.path)
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str):
        raise ValueError(f"{source.path}: the metadata has no general.architecture.")
    family = registry.find_gguf(gguf_config.family_name(file.metadata))
    hf = gguf_config.config_dict(file, family.architectures[0])
    pairs = gguf_config.rotated_pairs(hf, arch)
    checkpoint = GGUFCheckpoint(file, arch, hf["num_hidden_layers"], pairs)
    recorded = str(file.metadata.get("general.name") or source.path.stem)
    name = MODEL_ID if recorded == RECORDED_NAME else recorded.replace(" ", "-")
    generation = gguf_config.generation_defaults(file.metadata)
    pooling = gguf_config.pooling(file.metadata) or _pooling(family)
    head = EmbeddingHead((pooling,), gguf_config.dense_steps(file))
    return Opened(source, family, hf, checkpoint, source.name or name, generation, head)


def _open_hf(source: ModelSource) -> Opened:
    hf = as_classifier(hf_config.read_config(source.path), source.path, source.name or source.path.name)
    family = registry.find(hf["architectures"][0])
    stored = SafetensorsCheckpoint(source.path, hf)
    checkpoint: Checkpoint = stored
    if hf.get("quantization_config"):
        checkpoint = open_quantized(stored, hf["quantization_config"])
    else:
        refuse_packed(stored)
    if any(hf.get(name) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        checkpoint = ExpertLayouts(checkpoint, alternating=hf.get("model_type") == "gpt_oss")
    hf = hf_config.settle_head(hf, checkpoint)
    hears = family.tower is not None and family.tower.reads != "image"
    read = hf_config.sound_processor_config if hears else hf_config.processor_config
    if family.tower is not None and (processor := read(source.path)):
        hf = hf | {"preprocessor": processor}
        if video := hf_config.video_processor_config(source.path):
            hf = hf | {"video_preprocessor": video}
        if not hears and (sound := hf_config.sound_processor_config(source.path)):
            hf = hf | {"sound_preprocessor": sound}
    generation = {name: hf[name] for name in ("eos_token_id", "bos_token_id") if hf.get(name) is not None}
    if (source.path / "generation_config.json").exists():
        generation |= read_json(source.path / "generation_config.json")
    head = embedding_head(source.path, _pooling(family))
    return Opened(source, family, hf, checkpoint, source.name or source.path.name, generation, head)


def with_mmproj(opened: Opened, named: str | None) -> Opened:
    """A GGUF model with what reads images for it, where its file was named or lies beside it (`models.loading.gguf.mmproj`).

    Args:
        named: the file; "" for none.
    Raises:
        ValueError: there is none of that name, it is damaged, or it is for another model, in a sentence.
    """
    if opened.source.kind != "gguf":
        if named:
            raise ValueError(
                "mmproj: only GGUF models have such a file; what reads images is in the model's own folder."
            )
        return opened
    from models.loading.gguf.mmproj import find_mmproj, open_mmproj

    path = None if named == "" else find_mmproj(opened.source.path, named)
    if path is None:
        return opened
    metadata = open_gguf(opened.source.path).metadata
    tokens = [str(token) for token in metadata.get("tokenizer.ggml.tokens", ())]
    try:
        eyes = open_mmproj(path, opened.hf_config, tokens, metadata["general.architecture"])
    except ValueError as error:
        if named is not None:
            raise
        raise ValueError(f'{error} It lies beside the model: give another with mmproj, or "" for none.') from None
    family = dataclasses.replace(opened.family, tower=registry.find(eyes.architecture).tower)
    return dataclasses.replace(
        opened, family=family, hf_config={**opened.hf_config, **eyes.config}, tower=eyes.checkpoint
    )
