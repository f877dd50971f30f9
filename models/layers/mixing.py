"""A layer's token mixer by its configuration: attention, or what it has in its place."""

from __future__ import annotations

from typing import Any

from models.config import ModelConfig
from models.layers.attention import attention_of
from models.layers.build import Build
from models.layers.delta_net import GatedDeltaNet
from models.layers.mamba1 import Mamba1Mixer
from models.layers.mamba2 import Mamba2Mixer
from models.layers.short_conv import GatedShortConv
from models.mixers import DeltaNet, Mamba1, Mamba2, ShortConv


def mixer_of(config: ModelConfig, layer: int, build: Build, **options: Any) -> Any:
    """What mixes tokens in a layer.

    Args:
        options: of the layers that are no attention.
    """
    mixer = config.mixers[layer]
    if isinstance(mixer, DeltaNet):
        return GatedDeltaNet(config, mixer, build, **options)
    if isinstance(mixer, Mamba1):
        return Mamba1Mixer(config, mixer, build, **options)
    if isinstance(mixer, Mamba2):
        return Mamba2Mixer(config, mixer, build, **options)
    if isinstance(mixer, ShortConv):
        return GatedShortConv(config, mixer, build, **options)
    return attention_of(config, layer, build)
