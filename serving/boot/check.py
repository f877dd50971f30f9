"""The first of the start's four steps (check, load, compile, wire): whatever flags and headers can refute is refuted here, in a
sentence, before a weight is read."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh

from models.embedding_head import max_sequence
from models.loading.coded import count_coded
from models.loading.load import Built, build_model
from models.loading.opening import Opened, open_checkpoint, with_mmproj
from models.loading.source import ModelSource
from ops import native
from ops.linear.weights import grouped
from ops.paged_attention import BACKENDS
from serving.boot.draft import CheckedDraft, Target, check_draft
from serving.boot.senses.tower import CheckedTower, check_tower
from serving.engine.api.config import EngineConfig
from serving.engine.device.programs.bundle import Bundle
from serving.engine.device.programs.placement import num_replicas
from serving.engine.device.sizing import Bounds, resolve_bounds, resolve_dtype, resolve_quantization
from serving.engine.encoder.sizing import EncoderSizes, encoder_sizes
from serving.kv_events.config import KVEventsConfig
from serving.kv_events.start import check_installed
from serving.transfer.config import TransferConfig
from sharding.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Checked:
    """What flags and headers say, found good.

    Attributes:
        config: with what a bundle of programs decides.
        opened: the checkpoint's headers.
        built: the model as shapes; loading fills it.
        bounds: of a decoder: its sizes, but for what free memory decides.
        encoder: of an encoder: its sizes.
        draft: the model that guesses what this one says, or None.
        tower: what reads images for it, or None.
        programs: the folder of compiled programs, or None.
        bundle: programs that were compiled before, or None.
    """

    config: EngineConfig
    opened: Opened
    built: Built
    platform: str
    mesh: Mesh
    dtype: str
    quantization: str | None
    programs: pathlib.Path | None
    bundle: Bundle | None = None
    bounds: Bounds | None = None
    encoder: EncoderSizes | None = None
    draft: CheckedDraft | None = None
    tower: CheckedTower | None = None

    @property
    def generates(self) -> bool:
        """Whether the model writes; else it only reads."""
        return self.bounds is not None

    @property
    def server_mesh(self) -> Mesh | None:
        """The mesh that programs are placed on; None on a single device."""
        return self.mesh if self.mesh.size > 1 else None


def check(config: EngineConfig, source: ModelSource, programs: pathlib.Path | None) -> Checked:
    """Reads a checkpoint's headers and holds the configuration against them and against itself.

    Args:
        source: the checkpoint, resolved.
        programs: from `serving.boot.platform.programs_folder`.
    Raises:
        ValueError: a configuration or checkpoint that cannot be served, in a sentence.
    """
    bundle = None if config.compiled is None else Bundle.read(config.compiled)
    if bundle is not None:
        config = bundle.apply(config)
    platform, mesh = jax.default_backend(), make_mesh(config.mesh)
    _check_backend(config.attention_backend, platform)
    check_installed(KVEventsConfig.of(config.kv_events_config))
    _check_transfers(config)
    opened = open_checkpoint(source)
    if not config.language_model_only:
        opened = with_mmproj(opened, config.mmproj)
    dtype = resolve_dtype(config, platform)
    if "generate" not in opened.family.tasks:
        return _check_encoder(config, opened, platform, mesh, dtype, programs)
    built = build_model(opened, dtype=dtype, mesh=mesh, max_model_len=config.max_model_len)
    # A context that is asked for by name may be as long as the model's rotary scheme reaches.
    positions = built.config.longest_positions if config.max_model_len else built.config.max_positions
    draft = check_draft(config, mesh, dtype, config.max_model_len or positions, Target(opened, built))
    tower = check_tower(config, opened, built, mesh, config.max_model_len or positions, draft is not None)
    bounds = resolve_bounds(config, built.model, positions, dtype, mesh, draft=None if draft is None else draft.model)
    if config.kv_cache_memory is not None:
        sizes = bounds.within(config.kv_cache_memory)
        if bundle is not None:
            bundle.check(built.config, sizes)
    if config.kv_disk is not None and (bounds.recurrent is not None or num_replicas(mesh) > 1):
        why = (
            f"{opened.model_id} has layers that keep a state"
            if bounds.recurrent is not None
            else f"mesh is {config.mesh}"
        )
        raise ValueError(f"kv_disk is for models whose layers all attend, on a mesh without replicas; {why}.")
    in_blocks = 0
    if config.quantization == "auto":
        in_blocks = count_coded(built.model, opened.checkpoint, narrow=platform in grouped.PLATFORMS)
    quantization = resolve_quantization(config, platform, mesh.size, in_blocks)
    more = {"draft": draft, "tower": tower}
    return Checked(config, opened, built, platform, mesh, dtype, quantization, programs, bundle, bounds, **more)


def _check_encoder(
    config: EngineConfig, opened: Opened, platform: str, mesh: Mesh, dtype: str, programs: pathlib.Path | None
) -> Checked:
    """Of an encoder weights stay as they are unless a scheme is asked for by name: vectors are compared with those that others
    have stored."""
    if config.coordinator is not None:
        raise ValueError(f"{opened.model_id} is an encoder; an encoder runs in a single process.")
    for name in (
        "compiled",
        "kv_offload_gb",
        "kv_events_config",
        "speculative_config",
        "role",
        "kv_transfer_config",
        "kv_disk",
        "enable_lora",
    ):
        if getattr(config, name):
            raise ValueError(f"{name} is for models that generate; {opened.model_id} is an encoder.")
    quantization = None if config.quantization in ("none", "auto") else config.quantization
    built = build_model(opened, dtype=dtype, mesh=mesh)
    sizes = encoder_sizes(config, built.config.max_positions, max_sequence(opened.source.path), platform)
    return Checked(config, opened, built, platform, mesh, dtype, quantization, programs, encoder=sizes)


def _check_transfers(config: EngineConfig) -> None:
    """Refuses exchanging pages where that cannot be."""
    told = TransferConfig.of(config.role, config.kv_transfer_config)
    if config.kv_disk is not None and not config.kv_offload_gb:
        raise ValueError(
            "kv_disk keeps pages that leave host memory: say with kv_offload_gb how much of that there is."
        )
    if not told.role and config.kv_disk is None:
        return
    what = "role" if told.role else "kv_disk"
    if told.client_tls is not None:
        told.client_tls.grpc_arguments()  # reads the files
    if not config.enable_prefix_caching:
        raise ValueError(f"{what} needs enable_prefix_caching: pages from elsewhere are found as prefixes.")
    if config.coordinator is not None:
        raise ValueError(f"{what} is for an engine of a single process: one of several gives and takes no pages.")


def _check_backend(name: str | None, platform: str) -> None:
    """Refuses an implementation of attention that there is not, or not here."""
    if name is None:
        return
    if name not in BACKENDS:
        raise ValueError(f"attention_backend must be one of {', '.join(BACKENDS)}; got {name!r}.")
    here = {"native": platform == "cpu" and native.available(), "pallas_tpu": platform == "tpu"}
    if not here.get(name, True):
        raise ValueError(f"attention_backend {name} does not run here (platform {platform}); leave it out.")


def facts_of(checked: Checked) -> dict[str, Any]:
    """What `EngineInfo` says of any engine, whatever it does."""
    from serving.installation import version

    return {
        "model_id": checked.config.served_model_name or checked.opened.model_id,
        "architecture": checked.built.config.architecture,
        "vocab_size": checked.built.config.vocab_size,
        "dtype": checked.dtype,
        "quantization": checked.quantization,
        "mesh": checked.config.mesh,
        "platform": checked.platform,
        "version": version(),
    }
