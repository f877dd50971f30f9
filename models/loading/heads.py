"""Heads from checkpoints: those inside of a model's own, and those that have a directory of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.config import ModelConfig
from models.heads.eagle3 import Eagle3Config, Eagle3Head
from models.heads.mtp import MTP, MTPHead
from models.layers import Build
from models.loading.files.checkpoint import Checkpoint
from models.loading.files.safetensors import SafetensorsCheckpoint
from models.loading.hf_config import read_json
from models.loading.load import check_tensors, fill
from models.loading.opening import Opened
from models.loading.source import ModelSource

SPECULATORS = "speculators_model_type"
"""Says in a config.json that it is in speculators' format, and of which kind the draft is."""

ROWS_COMPARED = 4096
"""Rows of two tensors that are held against each other at once."""


@dataclasses.dataclass(frozen=True)
class OpenedHead:
    """A head whose headers have been read, found good for its model.

    Attributes:
        model_id: its own name, or its model's.
        made: how it is made.
        checkpoint: where its tensors are.
        model: an `nnx.Module` that is a `models.heads.Head`, parameters still abstract.
    """

    model_id: str
    made: MTP | Eagle3Config
    checkpoint: Checkpoint
    model: Any
    build: Build

    def load(self, model: Any, quantization: str | None, progress: bool) -> Any:
        """The head with its weights, and its model's that it shares.

        Args:
            model: the model, loaded.
        """
        head = self.model
        if isinstance(self.made, MTP) and _differs(self.checkpoint, self.made.names.head):
            head = MTPHead(self.made, self.build, own_head=True)
        fill(head, self.checkpoint, self.build, ignore=("",), quantization=quantization, progress=progress)
        head.share(model)
        return head


def has_mtp(opened: Opened) -> bool:
    """Whether a model's checkpoint has a head."""
    read, checkpoint = opened.family.mtp, opened.checkpoint
    return read is not None and checkpoint is not None and checkpoint.locate(_join(read(opened.hf_config))) is not None


def _join(made: MTP) -> str:
    return f"{made.names.join}.weight"


def open_mtp(opened: Opened, build: Build) -> OpenedHead:
    """The head in a model's checkpoint.

    Raises:
        ValueError: there is none, in a sentence.
    """
    read, checkpoint = opened.family.mtp, opened.checkpoint
    if read is None or checkpoint is None:
        raise ValueError(f"{opened.model_id} ({opened.family.name}) is of a family without heads that are read here.")
    made = read(opened.hf_config)
    if checkpoint.locate(_join(made)) is None:
        raise ValueError(f"{opened.model_id} has no head in its checkpoint: there is no tensor {_join(made)}.")
    head = MTPHead(made, build)
    check_tensors(head.recipes(), checkpoint, ("",))
    return OpenedHead(opened.model_id, made, checkpoint, head, build)


def open_eagle3(source: ModelSource, model: ModelConfig, build: Build) -> OpenedHead:
    """A directory with an EAGLE-3 head, in EAGLE's format or in that of speculators.

    Args:
        model: the one that it is to guess for.
    Raises:
        ValueError: it is something else, or a head for another model; naming what differs.
    """
    name = source.name or source.path.name
    if source.kind != "hf":
        raise ValueError(f"{name} is no directory with config.json and safetensors.")
    hf = read_json(source.path / "config.json")
    kind = hf.get(SPECULATORS, "eagle3")
    if kind != "eagle3":
        raise ValueError(f"{name} is of the kind {kind!r} ({SPECULATORS}); eagle3 is served.")
    if SPECULATORS not in hf and not _is_eagle3(hf):
        raise ValueError(f"{name} is no EAGLE-3 head: its architectures are {hf.get('architectures')}.")
    checkpoint = SafetensorsCheckpoint(source.path, hf)
    has = {
        "midlayer": checkpoint.locate("midlayer.self_attn.q_proj.weight") is not None,
        "d2t": checkpoint.locate("d2t") is not None,
        "embed_tokens": checkpoint.locate("embed_tokens.weight") is not None,
    }
    try:
        made = Eagle3Config.read(hf, model, has)
        head = Eagle3Head(made, build)
        check_tensors(head.recipes(), checkpoint, (r"^t2d$",))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return OpenedHead(name, made, checkpoint, head, build)


def is_head(source: ModelSource) -> bool:
    """Whether a directory has a head and no model."""
    if source.kind != "hf" or not (source.path / "config.json").exists():
        return False
    hf = read_json(source.path / "config.json")
    return SPECULATORS in hf or _is_eagle3(hf)


def _is_eagle3(hf: Mapping[str, Any]) -> bool:
    names = hf.get("architectures")
    return isinstance(names, list) and any("eagle3" in str(name).lower() for name in names)


def _differs(checkpoint: Checkpoint, name: str | None) -> bool:
    """Whether the checkpoint has an output projection of the head that is not the model's."""
    if name is None or checkpoint.locate(own := f"{name}.weight") is None:
        return False
    theirs = next((n for n in ("lm_head.weight", "model.embed_tokens.weight") if checkpoint.locate(n)), None)
    if theirs is None or checkpoint.shape(theirs) != checkpoint.shape(own):
        return True
    a, b = checkpoint.read(own), checkpoint.read(theirs)
    equal = all(
        np.array_equal(a[row : row + ROWS_COMPARED], b[row : row + ROWS_COMPARED])
        for row in range(0, len(a), ROWS_COMPARED)
    )
    checkpoint.release(own)
    return not equal
