"""What the registry knows of one family of architectures."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from models.config import ModelConfig
from models.heads.mtp import MTP


@dataclasses.dataclass(frozen=True)
class Tower:
    """What reads images, or sound, beside a decoder.

    Attributes:
        config: reads what config.json says of it; the content of preprocessor_config.json is under "preprocessor".
        build: (config, Build) -> a `models.api.ImageEncoder`, its parameters still abstract.
        tensors: a regular expression for the beginnings of its tensors' names, wherever they are saved.
        reads: "image" (one with ears also hears), "audio" (both make embeddings of places in the prompt) or "sound", of which all
            tokens attend to all (`models.api.Cross`).
        videos: whether it reads those too, frames one after the other.
    """

    config: Callable[[Mapping[str, Any]], Any]
    build: Callable[..., Any]
    tensors: str
    reads: str = "image"
    videos: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _told(self.config))


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture that can be loaded and served.

    Attributes:
        name: for people.
        architectures: `architectures` entries of config.json.
        gguf: `general.architecture` values of GGUF files.
        config: reads a config.json dictionary (for GGUF: the equivalent one made from its metadata).
        build: (config, Build) -> the module, its parameters still abstract.
        tasks: what a server does with it: "generate" and "embed" (a `models.api.CausalLM`), "embed" (an `Encoder`) or "classify"
            and "score" (a `Classifier`; it scores where it has one label). With "transcribe" it generates for sound alone.
        ignore: regular expressions for tensor names that checkpoints of this family carry without need.
        mtp: of the same dictionary, the head for further tokens that checkpoints may bring along.
        tower: what reads images for it, or None.
        traced: it was recorded of transformers' code (models/bridge), and a checkpoint is compared with that before it is served.
        by_layer: fields of which it heeds what `per_layer_config` says of single layers, which transformers lets any file have.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[Mapping[str, Any]], ModelConfig]
    build: Callable[..., Any]
    gguf: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ("generate", "embed")
    mtp: Callable[[Mapping[str, Any]], MTP] | None = None
    tower: Tower | None = None
    traced: bool = False
    by_layer: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", _told(self.config, None if self.traced else self.by_layer))


MAX_LAYERS = 10_000
"""Readers make a list with an entry a layer, so a number out of a damaged file must not get that far."""


def _told(
    read: Callable[[Mapping[str, Any]], Any], by_layer: tuple[str, ...] | None = None
) -> Callable[[Mapping[str, Any]], Any]:
    """`read`, with what a damaged config.json makes it raise as the ValueError that readers of checkpoints expect.

    Args:
        by_layer: as of `Family`; None where nothing of that is refused.
    """

    @functools.wraps(read)
    def config(hf: Mapping[str, Any]) -> Any:
        for name in ("num_hidden_layers", "n_layer"):
            if isinstance(layers := hf.get(name), int) and layers > MAX_LAYERS:
                raise ValueError(f"config.json has {name} = {layers}; {MAX_LAYERS} is the most.")
        try:
            if by_layer is not None:
                _check_layers(hf, by_layer)
            return read(hf)
        except KeyError as error:
            raise ValueError(f"config.json has no {error}: it is not a complete model configuration.") from error
        except (TypeError, AttributeError, ArithmeticError, LookupError) as error:
            raise ValueError(f"config.json has a field of a wrong type or value: {error}.") from error

    return config


def _check_layers(hf: Mapping[str, Any], by_layer: tuple[str, ...]) -> None:
    """Raises ValueError for what is said of one layer and nobody would heed."""
    for index, fields in (hf.get("per_layer_config") or {}).items():
        for name, value in fields.items():
            if name not in by_layer and (name not in hf or hf[name] != value):
                alike = f"differ in {' and '.join(by_layer)}" if by_layer else "cannot differ in that way"
                raise ValueError(
                    f"config.json: per_layer_config gives layer {index} a {name} of its own, {value!r:.60}. Layers of this family "
                    f"{alike}."
                )
