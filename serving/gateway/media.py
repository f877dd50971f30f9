"""What a gateway reads images and videos with: it counts their tokens, so that the prompt is whole and routed by what is in it, and
sends on what came. Towers are the engines'."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from serving.engine.api.config import EngineConfig
from serving.engine.api.types import EngineInfo

if TYPE_CHECKING:
    from models.loading.source import ModelSource
    from serving.media import MediaReader

log = logging.getLogger("serving.gateway")


def add_media_flags(parser: argparse.ArgumentParser) -> None:
    """The engines' own, by their names."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--limit-mm-per-prompt",
        metavar="JSON",
        help='images and videos that a request may have: {"image": 4, "video": 1}',
    )
    group.add_argument(
        "--allowed-media-domains", metavar="HOSTS",
        help="hosts from which images are fetched, with commas between them; * for any public one (default: none)",
    )  # fmt: skip
    group.add_argument(
        "--allowed-local-media-path",
        metavar="FOLDER",
        help="folder of which file:// URLs may name images (default: none)",
    )
    group.add_argument("--mmproj", metavar="FILE", help="as the engines', with a GGUF model")


def media_config(args: argparse.Namespace) -> EngineConfig:
    """The flags as an engine has them."""
    return EngineConfig(
        limit_mm_per_prompt=args.limit_mm_per_prompt,
        allowed_media_domains=args.allowed_media_domains,
        allowed_local_media_path=args.allowed_local_media_path,
    )


def media_of(args: argparse.Namespace, info: EngineInfo, source: ModelSource) -> MediaReader | None:
    """What reads a request's images and sounds; None where the engines read none, or nothing here can, which the log then says.

    Args:
        info: of the engines.
        source: of the model that they serve.
    Raises:
        ValueError: flags about them that cannot be followed.
    """
    if not {"image", "audio"} & set(info.modalities):
        return None
    from models.loading.opening import open_checkpoint, with_mmproj
    from serving.boot.senses.reading import media_policy
    from serving.boot.senses.tower import why_not
    from serving.media import reader_of

    opened = with_mmproj(open_checkpoint(source), args.mmproj)
    if (reason := why_not(opened)) is not None:
        log.warning("the engines read images or sounds, this gateway does not: %s", reason)
        return None
    config, architecture = media_config(args), opened.hf_config["architectures"][0]
    return reader_of(opened.hf_config, architecture, media_policy(config), info.media_patches, sends_on=True)
