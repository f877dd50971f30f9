"""The second step of the start: the weights, onto the devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from models.loading.heads import OpenedHead
from models.loading.kept.cache import WeightCache
from models.loading.load import LoadedModel, build_model, load_kept, load_model
from models.loading.source import resolve
from models.parameters import parameters_of, rounded_by
from ops import native
from serving.boot.check import Checked
from serving.boot.platform import weight_cache
from serving.engine.api import phases

log = logging.getLogger(__name__)


def load(checked: Checked, say: Callable[[str], None], kept: WeightCache | None = None) -> LoadedModel:
    """Reads every weight; says how long it took.

    Args:
        kept: where converted weights are looked for and kept.
    Raises:
        ValueError: a damaged file, or a missing, extra or wrongly shaped tensor, by name.
    """
    if checked.platform == "cpu":
        say(native.status())
    began = time.monotonic()
    loaded = load_model(
        checked.opened.source,
        dtype=checked.dtype,
        mesh=checked.mesh,
        quantization=checked.quantization,
        progress=checked.config.progress,
        opened=checked.opened,
        built=checked.built,
        kept=kept,
    )
    stored = f", {checked.quantization}" if checked.quantization else ""
    say(
        f"loaded {loaded.model_id} ({loaded.config.architecture}, {checked.dtype}{stored}) "
        f"in {time.monotonic() - began:.1f} s"
    )
    phases.record("load", time.monotonic() - began)
    return loaded


def reader(checked: Checked) -> Callable[[str | None], LoadedModel]:
    """How a running engine reads a checkpoint (None: its own again): same dtype, quantization and placement as at start. Its own
    weights come from where the start has kept them, others are not kept: each may be one of many."""

    def read(name: str | None) -> LoadedModel:
        kept = weight_cache(checked.config, log.info) if name is None else None
        if kept is not None:
            options = {"dtype": checked.dtype, "mesh": checked.mesh, "max_model_len": checked.config.max_model_len}
            built = build_model(checked.opened, **options)
            if (found := load_kept(checked.opened, built, checked.quantization, kept)) is not None:
                return found
        try:
            return load_model(
                checked.opened.source if name is None else resolve(name),
                dtype=checked.dtype,
                mesh=checked.mesh,
                quantization=checked.quantization,
                max_model_len=checked.config.max_model_len,
                progress=False,
                kept=kept,
            )
        finally:
            if kept is not None:
                kept.finish()

    return read


def weight_bytes(checked: Checked) -> int:
    """About what the weights will take of the devices, before they are read: shapes by the width they are kept in. A draft's and a
    tower's are among them."""
    width = {"int8": 1.05, "int4": 0.6, "stored": 0.75}.get(checked.quantization or "", 0.0)
    models = [checked.built.model]
    models += [] if checked.draft is None else [checked.draft.model]
    models += [] if checked.tower is None else [checked.tower.built.model]
    total = 0.0
    for model in models:
        narrow = rounded_by(model, checked.quantization)
        for path, weight in parameters_of(model):
            value = weight.get_value()
            total += value.size * (width if path in narrow else value.dtype.itemsize)
    return int(total)


def load_draft(checked: Checked, model: Any, say: Callable[[str], None], kept: WeightCache | None = None) -> Any:
    """The draft with its weights, of the same dtype and quantization as the model's; None where there is none.

    Args:
        model: the model, loaded, whose table and output projection heads share.
    Raises:
        ValueError: as `load_model`.
    """
    if checked.draft is None:
        return None
    if isinstance(checked.draft.opened, OpenedHead):
        head = checked.draft.opened.load(model, checked.quantization, checked.config.progress)
        say(f"loaded the head of {checked.draft.opened.model_id}")
        return head
    loaded = load_model(
        checked.draft.opened.source,
        dtype=checked.dtype,
        mesh=checked.mesh,
        quantization=checked.quantization,
        progress=checked.config.progress,
        opened=checked.draft.opened,
        built=checked.draft.built,
        kept=kept,
    )
    say(f"loaded the draft {loaded.model_id} ({loaded.config.architecture})")
    return loaded.model
