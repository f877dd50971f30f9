"""A checkpoint's tower through the start: whether there is one to serve, how large its store is, and its weights."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from models.encoders.audio.whisper import in_pages
from models.family import Tower
from models.loading.load import Built, fill
from models.loading.opening import Opened
from ops.paged_attention import whole
from serving.engine.device.media import VisionTower, frame_sizes, patch_sizes, tile_sizes
from serving.engine.device.programs.packing import MediaShape
from serving.engine.device.programs.placement import num_replicas
from serving.engine.device.sizing import resolve_kv_dtype

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from serving.engine.api.config import EngineConfig

GIB = 2**30
ALONE = ("coordinator", "compiled")
"""Settings with which images are not read."""

ADAPTER = "adapter_config.json"
"""Beside a checkpoint: it has an adapter of its own, for what its towers read."""
LEAST_WINDOWS = 8
"""Windows of sound that there is room for, whatever the memory for embeddings."""


@dataclasses.dataclass(frozen=True)
class CheckedTower:
    """A tower's headers, found good.

    Attributes:
        built: the network as shapes; loading fills it.
        shape: how the engine reads images with it.
    """

    built: Built
    shape: MediaShape
    family: Tower

    @property
    def store_bytes(self) -> int:
        """What one replica's store of embeddings takes."""
        return self.shape.rows * _row_bytes(self.shape)


def check_tower(
    config: EngineConfig, opened: Opened, built: Built, mesh: Mesh, positions: int, drafts: bool
) -> CheckedTower | None:
    """Reads what a checkpoint says of its tower. None where there is nothing to read images with: no tower, no processor's
    configuration, no Pillow, or `language_model_only`.

    Args:
        built: the decoder.
        positions: tokens that a sequence may have.
        drafts: whether a model or head drafts.
    Raises:
        ValueError: a tower that cannot be served with these settings, in a sentence.
    """
    tower = opened.family.tower
    if tower is None:
        return None
    if tower.reads == "sound":
        return _check_sound(config, opened, built, mesh, tower)
    if config.language_model_only or why_not(opened) is not None:
        return None
    for name in ALONE:
        if getattr(config, name) is not None:
            raise ValueError(f"{name}: images are not read with it yet. Add language_model_only to serve text alone.")
    how = config.speculative_config
    if how is not None and how.model is not None:
        raise ValueError(
            "speculative_config: a draft model reads no images. Add language_model_only to serve text alone."
        )
    numbers = tower.config(opened.hf_config)
    if numbers.out_dim != built.config.embed_dim:
        raise ValueError(
            f"{opened.model_id}: its tower makes embeddings of {numbers.out_dim} numbers, its layers take "
            f"{built.config.embed_dim}."
        )
    module = tower.build(numbers, built.build)
    per = _frames_of_row(numbers) if tower.reads == "audio" else 0
    dtype, width = built.build.compute_dtype, numbers.width
    wanted = int(config.mm_encoder_cache_gb * GIB) // (width * jnp.dtype(dtype).itemsize) // num_replicas(mesh)
    axes = built.config.rope is not None and len(built.config.rope.sections) == 3
    shape = MediaShape(
        rows=wanted,
        width=width,
        dtype=jnp.dtype(dtype).name,
        axes=axes,
        patches=_sizes(numbers, per, positions),
        patch_dim=numbers.patch_dim,
        merge=numbers.merge,
        together=numbers.together,
        tile=numbers.tile,
        picked=numbers.picked,
        lines=numbers.lines,
        per=per,
        always=numbers.get("always", 0),
    )
    if (ears := numbers.ears) is not None:
        per = _frames_of_row(ears)
        heard = {"patches": _sizes(ears, per, positions), "patch_dim": ears.patch_dim, "per": per}
        heard |= {"merge": 1, "together": False, "tile": 0, "picked": 0, "lines": 0, "always": ears.get("always", 0)}
        shape = dataclasses.replace(shape, ears=dataclasses.replace(shape, **heard))
    largest = max(each.embeddings(each.patches[-1]) for each in (shape, shape.of(sound=True)))
    shape = _with_rows(shape, max(wanted, largest))
    _check_together(config, shape)
    return CheckedTower(Built(module, numbers, built.build), shape, tower)


def _with_rows(shape: MediaShape, rows: int) -> MediaShape:
    """With room for so many embeddings, whosever they are."""
    ears = None if shape.ears is None else dataclasses.replace(shape.ears, rows=rows)
    return dataclasses.replace(shape, rows=rows, ears=ears)


def _frames_of_row(numbers: Any) -> int:
    """Frames of sound that become one embedding."""
    return numbers.get("per") or 2 * numbers.get("stack")


def _sizes(numbers: Any, per: int, positions: int) -> tuple[int, ...]:
    """P of the programs that a tower has.

    Args:
        per: frames of an embedding; 0 of images.
        positions: tokens that a sequence may have.
    """
    most = numbers.max_patches
    if per:
        step = numbers.get("chunk") or per
        return (most,) if numbers.get("whole") else frame_sizes(min(most, positions * per), most, step)
    if numbers.tile:
        return tile_sizes(most, numbers.tile)
    return patch_sizes(min(most, positions * numbers.merge**2), numbers.merge)


def _check_together(config: EngineConfig, shape: MediaShape) -> None:
    """Raises ValueError where an image whose tokens attend to each other might not fit a step beside the running requests."""
    largest, budget, seqs = shape.embeddings(shape.patches[-1]), config.max_num_batched_tokens, config.max_num_seqs
    if shape.together and budget is not None and budget < largest + (seqs or 0):
        raise ValueError(
            f"max_num_batched_tokens is {budget}: an image of this model is {largest} tokens that one step must hold, beside one "
            f"of each running request. Give at least {largest + (seqs or 0)}, or add language_model_only to serve text alone."
        )


def _by_kernels(config: EngineConfig, built: Built, mesh: Mesh) -> bool:
    """Whether the CPU's kernels attend to sound, in bfloat16: where they read the decoder's pages rounded."""
    decoder, platform = built.config, mesh.devices.flat[0].platform
    dtype = resolve_kv_dtype(config, built.model, jnp.dtype(built.build.compute_dtype).name, mesh.size)
    return (
        mesh.size == 1
        and dtype in ("bfloat16", "int8")
        and whole.supports(decoder.num_heads, decoder.head_dim, platform)
    )


def _check_sound(config: EngineConfig, opened: Opened, built: Built, mesh: Mesh, tower: Tower) -> CheckedTower:
    """As `check_tower`, of a model that does nothing without its encoder."""
    for name in (*ALONE, "speculative_config"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name} does not go with a model for speech yet; leave it out.")
    if (config.num_scheduler_steps or 1) > 1 or config.enable_lora or config.language_model_only:
        raise ValueError("num_scheduler_steps, enable_lora and language_model_only do not go with a model for speech.")
    if (reason := why_not(opened)) is not None:
        raise ValueError(f"{opened.model_id} cannot be served: {reason}.")
    numbers, dtype = tower.config(opened.hf_config), jnp.dtype(built.build.compute_dtype)
    if _by_kernels(config, built, mesh):
        numbers, dtype = in_pages(numbers), jnp.dtype(jnp.uint16)
        built.model.read_pages(numbers.get("positions"))
    first = opened.generation_config.get("no_timestamps_token_id")
    built.model.first_time = None if first is None else int(first) + 1
    wanted = int(config.mm_encoder_cache_gb * GIB) // (numbers.width * dtype.itemsize) // num_replicas(mesh)
    shape = MediaShape(
        rows=max(wanted, min(config.max_num_seqs or LEAST_WINDOWS, LEAST_WINDOWS)),
        width=numbers.width,
        dtype=dtype.name,
        axes=False,
        patches=(numbers.max_patches,),
        patch_dim=numbers.patch_dim,
        merge=1,
        lasting=True,
    )
    return CheckedTower(Built(tower.build(numbers, built.build), numbers, built.build), shape, tower)


def why_not(opened: Opened) -> str | None:
    """Why a checkpoint whose family has a tower reads no images here, in a sentence; None where it does."""
    if opened.checkpoint is None or (opened.source.kind != "hf" and opened.tower is None):
        return "images and sound are read from Hugging Face directories, and images with a GGUF model's mmproj file"
    sound = opened.family.tower is not None and opened.family.tower.reads != "image"
    if not sound and not opened.hf_config.get("vision_config"):
        return "its config.json has no vision_config"
    if not opened.hf_config.get("preprocessor"):
        return "it has no preprocessor_config.json"
    if importlib.util.find_spec("soundfile" if sound else "PIL") is None:
        return f"{'soundfile' if sound else 'Pillow'} is not installed (extra multimodal)"
    return None


def load_tower(
    tower: CheckedTower | None,
    opened: Opened,
    mesh: Mesh | None,
    quantization: str | None,
    progress: bool,
    say: Callable[[str], None],
) -> VisionTower | None:
    """The tower with its weights; None where there is none.

    Args:
        mesh: that programs are placed on.
    Raises:
        ValueError: as `load_model`.
    """
    if tower is None:
        if opened.family.tower is not None:
            say(f"{opened.model_id} is served for text alone: {why_not(opened) or 'as it was asked for'}")
        return None
    assert opened.checkpoint is not None
    beside = rf"^(?!{tower.family.tensors.removeprefix('^')})"
    module: Any = tower.built.model
    ignore = (beside, *getattr(module, "unused", ()))
    stored = opened.tower or opened.checkpoint
    if (opened.source.path / ADAPTER).exists():
        say(f"{opened.model_id} has an adapter beside it: --enable-lora --default-mm-loras applies it where it belongs")
    fill(module, stored, tower.built.build, ignore=ignore, quantization=quantization, progress=progress)
    shape, room = tower.shape, f"{tower.shape.rows * _row_bytes(tower.shape) / 2**20:.0f} MiB"
    if tower.family.reads == "audio":
        seconds = shape.patches[-1] * tower.built.config.get("frame_s", 0.01)
        say(
            f"sounds: windows up to {seconds:g} s, {len(shape.patches)} program sizes; room for {shape.rows} embeddings ({room})"
        )
        return VisionTower(module, shape, mesh)
    if shape.lasting:
        say(f"sound: room for {shape.rows} windows of 30 s ({room})")
        return VisionTower(module, shape, mesh)
    say(
        f"images: up to {shape.patches[-1]} patches each, {len(shape.patches)} program sizes; room for {shape.rows} embeddings "
        f"({room})"
    )
    if (ears := shape.ears) is not None:
        say(
            f"sounds: windows up to {ears.patches[-1] / 100:g} s, {len(ears.patches)} program sizes; room as for images"
        )
    return VisionTower(module, shape, mesh)


def _row_bytes(shape: MediaShape) -> int:
    return shape.width * jnp.dtype(shape.dtype).itemsize
