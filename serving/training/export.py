"""What comes out of training: a directory that `peft` writes and reads, or a whole model as safetensors."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from models.loading.opening import Opened
from models.loading.orbax import POOLING_FILES, TOKENIZER_FILES
from models.recipes import Piece, Recipe, given_back
from serving.text.tokenizer import Tokenizer
from serving.text.tokenizer_saving import write_tokenizer
from serving.training.lora import ALL_LINEAR, LoraSettings, names_of

FILE_BYTES = 4 << 30
"""Of weights in one file, unless one tensor is larger."""

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}

_MODEL_TYPES = {
    "Gemma3ForCausalLM": "gemma3_text",
    "Llama4ForCausalLM": "llama4_text",
    "GraniteMoeForCausalLM": "granitemoe",
    "GPT2LMHeadModel": "gpt2",
    "SmolLM3ForCausalLM": "smollm3",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "XLMRobertaModel": "xlm-roberta",
    "OlmoeForCausalLM": "olmoe",
    "Gemma3nForCausalLM": "gemma3n_text",
    "Gemma4ForCausalLM": "gemma4_text",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
}
"""`model_type` of architectures where it is not the class's name in small letters with underscores."""


def write_peft(
    out: Path,
    pairs: Mapping[str, Mapping[str, np.ndarray]],
    settings: LoraSettings,
    *,
    base: str,
    turned: bool = False,
    generates: bool = True,
) -> None:
    """An adapter directory: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        pairs: by the names of the base's tensors ("model.layers.0.self_attn.q_proj.weight"): "a" [r, I] and "b" [O, r], float32.
        base: what the adapter belongs to, for people and for those who fetch it.
        turned: the base keeps its matrices [in, out], as GPT-2 does.
        generates: it is a language model, not an embedding model.
    """
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, pair in pairs.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(pair["a"], np.float32)
        tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(pair["b"], np.float32)
    _save(tensors, out / "adapter_model.safetensors")
    given = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if generates else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "target_modules": names_of(pairs) if given == ALL_LINEAR else given,
        "bias": "none",
        "fan_in_fan_out": turned,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    # Last: a directory without it is not taken for an adapter.
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def merged(
    opened: Opened,
    recipes: Mapping[str, Recipe],
    pairs: Mapping[str, Mapping[str, np.ndarray]],
    settings: LoraSettings,
) -> Iterator[tuple[str, np.ndarray]]:
    """The base's tensors, those with a pair changed by it, in float32 there."""
    checkpoint = opened.checkpoint
    if checkpoint is None:
        raise ValueError(
            "--merge reads the base's own tensors, which a directory written by serving.convert does not have."
        )
    for piece in pieces_of(recipes):
        values = checkpoint.read(piece.name)
        pair = pairs.get(piece.name)
        if pair is not None:
            change = settings.scale * (np.asarray(pair["b"], np.float32) @ np.asarray(pair["a"], np.float32))
            values = values.astype(np.float32) + (change.T if piece.turned else change)
        yield piece.name, values
        checkpoint.release(piece.name)


def trained(
    opened: Opened, recipes: Mapping[str, Recipe], values: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors of a model whose parameters are `values`; what is not among them is the base's."""
    made = given_back((recipes[path], value) for path, value in values.items())
    yield from made.items()
    for piece in pieces_of(recipes):
        if piece.name not in made:
            assert opened.checkpoint is not None
            yield piece.name, opened.checkpoint.read(piece.name)


def pieces_of(recipes: Mapping[str, Recipe]) -> Iterable[Piece]:
    """Every tensor of the checkpoint that is in the network, once."""
    return {piece.name: piece for recipe in recipes.values() for piece in recipe.pieces}.values()


def write_model(out: Path, tensors: Iterable[tuple[str, np.ndarray]], opened: Opened, dtype: str) -> None:
    """A model directory: config.json, generation_config.json and safetensors, in files of `FILE_BYTES`."""
    out.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, np.ndarray]] = [{}]
    written, where = [], {}

    def flush() -> None:
        written.append(f"part-{len(written)}.safetensors")
        _save(files[-1], out / written[-1])
        where.update(dict.fromkeys(files[-1], written[-1]))
        files[-1] = {}

    size = total = 0
    for name, values in tensors:
        values = np.ascontiguousarray(values.astype(DTYPES[dtype]))
        if files[-1] and size + values.nbytes > FILE_BYTES:
            flush()
            size = 0
        files[-1][name] = values
        size, total = size + values.nbytes, total + values.nbytes
    flush()
    _name_files(out, written, where, total)
    config = {**opened.hf_config, "dtype": dtype, "torch_dtype": dtype}
    config.pop("quantization_config", None)
    config.setdefault("model_type", model_type(config["architectures"][0]))
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if opened.generation_config:
        (out / "generation_config.json").write_text(json.dumps(opened.generation_config, indent=2), encoding="utf-8")


def _save(tensors: dict[str, np.ndarray], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # the library leaves it to its owner alone, and a server may be somebody else


def _name_files(out: Path, written: list[str], where: Mapping[str, str], total: int) -> None:
    """The names that readers look for, now that the number of files is known."""
    if len(written) == 1:
        (out / written[0]).replace(out / "model.safetensors")
        return
    names = {name: f"model-{index:05}-of-{len(written):05}.safetensors" for index, name in enumerate(written, 1)}
    for old, new in names.items():
        (out / old).replace(out / new)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[file] for name, file in where.items()}}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def model_type(architecture: str) -> str:
    """`model_type` of config.json, which files other than Hugging Face's do not have."""
    known = _MODEL_TYPES.get(architecture)
    if known is not None:
        return known
    name = re.sub(r"(For[A-Z]\w+|LMHeadModel|Model)$", "", architecture)
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def write_text_side(out: Path, opened: Opened, tokenizer: Tokenizer, template: str | None) -> None:
    """The tokenizer's files beside what was trained with them, and what the base says of embeddings.

    Args:
        template: the chat template that was trained with, where it is not the model's own.
    """
    source = opened.source.path
    if opened.source.kind == "gguf":
        if tokenizer.reads_text:
            write_tokenizer(tokenizer, out)
    else:
        for name in (*TOKENIZER_FILES, *POOLING_FILES):
            if (source / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copy(source / name, out / name)
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
