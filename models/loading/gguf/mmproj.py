"""What reads images beside a GGUF model: the file that llama.cpp calls mmproj, as the families' towers ask for tensors, and its
metadata as their configuration says the same."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.loading.gguf.checkpoint import half_split_rows
from models.loading.gguf.file import GGUFFile
from models.loading.gguf.mmproj_config import KINDS, Kind

BESIDE = re.compile(r"(?:^|[-._])mmproj(?:$|[-._])", re.IGNORECASE)


def find_mmproj(model: Path, named: str | None) -> Path | None:
    """The file to read images with: the one that was named, or the only one, or first by name, that lies beside the model.

    Raises:
        ValueError: there is none of that name.
    """
    if named is not None:
        path = Path(named).expanduser()
        if not path.is_file():
            raise ValueError(f"mmproj: there is no file {named}.")
        return path
    found = sorted(path for path in model.parent.glob("*.gguf") if BESIDE.search(path.name.removesuffix(".gguf")))
    return found[0] if found else None


@dataclasses.dataclass(frozen=True)
class Eyes:
    """A tower's file, its headers read.

    Attributes:
        architecture: of the whole, as config.json would name it.
        config: what config.json and the processor's file would say of images.
        checkpoint: its tensors.
    """

    architecture: str
    config: dict[str, Any]
    checkpoint: MmprojCheckpoint


def open_mmproj(path: Path, text: Mapping[str, Any], tokens: Sequence[str], arch: str) -> Eyes:
    """Reads a tower's headers.

    Args:
        text: config.json of the model beside it, as its own file says it.
        tokens: its vocabulary.
        arch: its `general.architecture`.
    Raises:
        ValueError: no such file, damaged, of a kind that is not read, or for another model, in a sentence.
    """
    file = GGUFFile(path)
    metadata = file.metadata
    if metadata.get("general.architecture") != "clip":
        raise ValueError(
            f"{path} is no file that reads images: its architecture is {metadata.get('general.architecture')!r}."
        )
    name = metadata.get("clip.vision.projector_type") or metadata.get("clip.projector_type")
    kind = KINDS.get(name if isinstance(name, str) else "")
    if kind is None or arch not in kind.beside:
        where = "" if kind is None else f" beside a model of the architecture {arch!r}"
        raise ValueError(
            f"{path}: its projector {name!r} is not read here{where}; there are {', '.join(sorted(KINDS))}."
        )
    try:
        config = kind.config(file, text)
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is damaged: its metadata or its tensors lack {error}.") from None
    architecture = kind.architecture(arch, file)
    places = {key: tokens.index(token) for key, token in kind.tokens.items() if token in tokens}
    if "image_token_id" not in places:
        raise ValueError(f"{path}: the model beside it has no token {kind.tokens['image_token_id']!r} for images.")
    hf = {**config, **places, "architectures": [architecture]}
    return Eyes(architecture, hf, MmprojCheckpoint(file, kind, hf))


@dataclasses.dataclass(frozen=True)
class _Made:
    """A tensor of the tower's: from which of the file's, of which shape, and how."""

    sources: tuple[str, ...]
    shape: tuple[int, ...]
    make: Callable[..., np.ndarray]


class MmprojCheckpoint:
    """`models.loading.files.checkpoint.Checkpoint` of the tower alone, by Hugging Face's names; what llama.cpp's converter did to
    tensors is undone."""

    def __init__(self, file: GGUFFile, kind: Kind, hf: Mapping[str, Any]) -> None:
        self.file = file
        self._made = _tensors(file, kind, int(hf["vision_config"].get("num_attention_heads") or 1))

    @property
    def own_names(self) -> Collection[str]:
        return self._made.keys()

    def canonical(self, name: str) -> str:
        return name

    def locate(self, name: str) -> str | None:
        return name if name in self._made else None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._made[name].shape

    def read(self, name: str) -> np.ndarray:
        made = self._made[name]
        return made.make(*(self.file.read(source) for source in made.sources)).reshape(made.shape)

    def release(self, name: str) -> None:
        for source in self._made[name].sources:
            self.file.release(source)


def _tensors(file: GGUFFile, kind: Kind, heads: int) -> dict[str, _Made]:
    """All tensors of the tower by their names in Hugging Face's checkpoints.

    Raises:
        ValueError: the file has one that nothing is known of.
    """
    found: dict[str, _Made] = {}
    left = {name for name in file.tensors if not kind.ignored or not re.match(kind.ignored, name)}
    for suffix in ("weight", "bias"):
        for layer in range(int(file.metadata.get("clip.vision.block_count", 0)) if kind.fused else 0):
            parts = tuple(f"v.blk.{layer}.attn_{one}.{suffix}" for one in "qkv")
            if all(part in file.tensors for part in parts):
                shapes = [file.tensors[part].shape for part in parts]
                shape = (sum(one[0] for one in shapes), *shapes[0][1:])
                found[f"{kind.fused.format(layer)}.{suffix}"] = _Made(parts, shape, lambda *x: np.concatenate(x))
                left -= set(parts)
    frames = ("v.patch_embd.weight", "v.patch_embd.weight.1")
    if all(name in file.tensors for name in frames):
        shape = file.tensors[frames[0]].shape
        whole = (*shape[:2], 2, *shape[2:])
        found[f"{kind.patch}.weight"] = _Made(frames, whole, lambda *x: np.stack(x, axis=2))
        left -= set(frames)
    for name in sorted(left):
        own = kind.name_of(name, file)
        if own is None:
            raise ValueError(f"{file.path} has a tensor {name!r}, which is not read with this projector.")
        found[own] = _Made((name,), kind.shape_of(own, file.tensors[name].shape), _undone(kind, name, heads))
    return found


def _undone(kind: Kind, name: str, heads: int) -> Callable[..., np.ndarray]:
    if kind.rotated and re.match(r"v\.blk\.\d+\.attn_[qk]\.", name):
        return lambda values: half_split_rows(values, heads)
    if name == "mm.soft_emb_norm.weight":
        return lambda values: values.astype(np.float32) - 1.0
    return lambda values: values
