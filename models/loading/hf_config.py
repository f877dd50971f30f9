"""A Hugging Face directory's configuration: its `config.json` as families read it, and what the weights say where it does not."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from models import defaults
from models.config import is_bare
from models.loading.files import consolidated
from models.loading.files.checkpoint import Checkpoint

log = logging.getLogger(__name__)

HEAD = "lm_head.weight"
TABLES = ("transformer.wte.weight", "model.embeddings.weight", "model.embed_tokens.weight")
_ROWS = 4096  # compared at once


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Numbers that JSON lacks are as transformers writes them: {"__float__": "Infinity"}.

    Raises:
        ValueError: it is not one.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=_number)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object.")
    return value


def _number(value: dict[str, Any]) -> Any:
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a language model, complete: a multimodal model's text part is unwrapped, and what the file leaves out has
    its family's default.

    `tie_word_embeddings` is missing where the file does not say it: `settle_head` does.

    Raises:
        ValueError: not JSON, or no architecture is named.
    """
    path = directory / "config.json"
    if not path.exists() and (directory / "params.json").exists():
        return _completed(consolidated.config_of(read_json(directory / "params.json")))
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """The same of a file of any name.

    Raises:
        ValueError: as `read_config`.
    """
    hf = read_json(path)
    if not hf.get("architectures"):
        raise ValueError(f"{path} names no architecture (its `architectures` is empty).")
    if not isinstance(hf["architectures"], list) or not isinstance(hf["architectures"][0], str):
        raise ValueError(
            f"{path} has `architectures` that are no list of names: {json.dumps(hf['architectures'])[:60]}."
        )
    if isinstance(thinker := hf.get("thinker_config"), Mapping):  # what writes text, beside what speaks
        hf = {**thinker, "architectures": hf["architectures"]}
    text = hf.get("text_config")
    if isinstance(text, Mapping) and "num_hidden_layers" not in hf:
        said = {name: hf[name] for name in hf.keys() & text.keys()}
        hf = {**hf, **text, "architectures": hf["architectures"], "beside_text": said}
        hf.pop("tie_word_embeddings", None)  # the two may differ
    if packed := _packing(path.parent, hf):
        hf["quantization_config"] = packed
    return _completed(hf)


def processor_config(directory: Path) -> dict[str, Any] | None:
    """How the checkpoint's images are scaled and cut: the part of processor_config.json that newer files have, or
    preprocessor_config.json; None where there is neither."""
    return _processor(directory, "image_processor", "preprocessor_config.json")


def video_processor_config(directory: Path) -> dict[str, Any] | None:
    """The same of its videos; None where only the images' file speaks for them."""
    return _processor(directory, "video_processor", "video_preprocessor_config.json")


def sound_processor_config(directory: Path) -> dict[str, Any] | None:
    """How the checkpoint's sounds become spectrograms; None where no file says."""
    found = _processor(directory, "feature_extractor", "preprocessor_config.json", "audio_processor")
    if found is not None and (directory / "processor_config.json").exists():
        found |= {k: v for k, v in read_json(directory / "processor_config.json").items() if k == "max_audio_len"}
    return found


def _processor(directory: Path, part: str, own: str, other: str = "") -> dict[str, Any] | None:
    """As transformers, which prefers the part of the newer file; `other`: how some families call it."""
    if (directory / "processor_config.json").exists():
        whole = read_json(directory / "processor_config.json")
        said = whole.get(part, whole.get(other))
        if isinstance(said, Mapping):
            return dict(said)
    return read_json(directory / own) if (directory / own).exists() else None


def _packing(directory: Path, hf: Mapping[str, Any]) -> dict[str, Any] | None:
    """How the weights are packed: under the name that a tool gives it, or in modelopt's own file; None of dense ones."""
    for name in ("quantization_config", "compression_config", "quantization"):
        given = hf.get(name)
        if given and isinstance(given, Mapping):
            return dict(given)
        if given and name == "quantization_config":
            raise ValueError(f"config.json has a {name} that is no object: {json.dumps(given)[:60]}.")
    own = directory / "hf_quant_config.json"
    if not own.exists():
        return None
    said = read_json(own).get("quantization")
    return {"quant_method": "modelopt", **said} if isinstance(said, Mapping) and said.get("quant_algo") else None


def _completed(hf: dict[str, Any]) -> dict[str, Any]:
    whole, tied = defaults.complete(hf), hf.get("tie_word_embeddings")
    whole.pop("tie_word_embeddings", None)
    return whole if tied is None else whole | {"tie_word_embeddings": tied}


def settle_head(hf: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration with `tie_word_embeddings` as the weights have it, as transformers 5 decides it: a head of other values
    than the embedding table is used, whatever the file says.

    Args:
        hf: from `read_config`.
        checkpoint: the weights, unpacked as they are read.
    Raises:
        ValueError: the file says that the two differ, and the checkpoint has only one.
    """
    if is_bare(hf["architectures"][0]):
        return hf | {"tie_word_embeddings": True}
    own, said = checkpoint.locate(HEAD), hf.get("tie_word_embeddings")
    if own is None:
        return hf | {"tie_word_embeddings": True if said is None else said}
    table = next((name for name in TABLES if checkpoint.locate(name) is not None), None)
    if table is not None and checkpoint.locate(table) == own:
        if said is False:
            raise ValueError(
                f"the checkpoint has no tensor {table!r}, and its config.json says that it is not the head's."
            )
        return hf | {"tie_word_embeddings": True}
    if said is False or table is None:
        return hf | {"tie_word_embeddings": False}
    tied = _equal(checkpoint, HEAD, table)
    if not tied and said:
        log.warning(
            "config.json ties the embeddings (tie_word_embeddings), but the checkpoint has a head of its own with other values: "
            "the head is used."
        )
    return hf | {"tie_word_embeddings": tied}


def _equal(checkpoint: Checkpoint, one: str, other: str) -> bool:
    if tuple(checkpoint.shape(one)) != tuple(checkpoint.shape(other)):
        return False
    first, second = checkpoint.read(one), checkpoint.read(other)
    rows = range(0, len(first), _ROWS)
    equal = all(np.array_equal(first[row : row + _ROWS], second[row : row + _ROWS]) for row in rows)
    if equal:
        checkpoint.release(one)
    return equal
