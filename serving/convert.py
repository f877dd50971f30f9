"""`python -m serving.convert`: any checkpoint that can be served, written as an Orbax directory of ours.

It is laid out for a mesh, so that each device later reads exactly its shards, and `--model` takes it like any other. With
`--adapter` the adapter is merged into the model, and what is written are safetensors that others read too.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

DTYPES = ("float32", "bfloat16", "float16")


def convert(model: str | None, out: Path, *, dtype: str = "bfloat16", mesh: str | None = None) -> None:
    """Loads a model and writes it.

    Args:
        model: as `--model` of the server; None for the default model.
        out: a directory that does not exist.
        dtype: of the weights as written.
        mesh: as `--mesh`; None for one device.
    Raises:
        ValueError: the model cannot be loaded, or `out` exists.
    """
    from models.loading import orbax
    from models.loading.gguf.file import GGUFFile
    from models.loading.load import load_model, resolve
    from models.loading.opening import open_checkpoint
    from models.parameters import parameters_of
    from serving.text.tokenizer import Tokenizer
    from serving.text.tokenizer_saving import write_tokenizer
    from sharding.mesh import make_mesh

    if out.exists():
        raise ValueError(f"{out} exists already; give a directory that does not.")
    source = resolve(model)
    loaded = load_model(source, dtype=dtype, mesh=make_mesh(mesh) if mesh else None)
    orbax.save(
        out,
        dict(parameters_of(loaded.model)),
        model_id=loaded.model_id,
        hf_config=open_checkpoint(source).hf_config,
        generation_config=loaded.generation_config,
        tokenizer_from=None if source.kind == "gguf" else source.path,
    )
    if source.kind == "gguf":
        write_tokenizer(Tokenizer.from_gguf(GGUFFile(source.path).metadata), out)


def merge(model: str | None, adapter: str, out: Path, *, dtype: str = "bfloat16") -> int:
    """Writes a model with an adapter in it, as a Hugging Face directory. The adapter's tokenizer and template come with it.

    Args:
        model: the base, as `--model` of the server.
        adapter: a directory that peft wrote, or a hub id.
        out: a directory that does not exist.
        dtype: of the weights as written.
    Returns:
        how many of the base's weights were changed.
    Raises:
        ValueError: the base or the adapter cannot be read, they do not fit each other, or `out` exists.
    """
    from models.adapters.adapter import TIED_HEAD, Base
    from models.adapters.merge import Merging, config_of
    from models.adapters.peft import read_peft
    from models.adapters.read import locate
    from models.loading.files.canonical import canonical_name
    from models.loading.load import build_model, resolve
    from models.loading.opening import open_checkpoint
    from models.loading.orbax import TOKENIZER_FILES
    from serving.boot.text_side import load_text_side
    from serving.training.export import write_model, write_text_side

    if out.exists():
        raise ValueError(f"{out} exists already; give a directory that does not.")
    source, folder = resolve(model), locate(adapter)
    opened = open_checkpoint(source)
    if opened.checkpoint is None:
        raise ValueError(
            "An adapter is merged into a checkpoint's own tensors, which a directory of ours does not have."
        )
    built = build_model(opened)
    config = built.config
    moe = None if config.moe is None else (config.moe.num_experts, config.embed_dim, config.moe.ffw_dim)
    recipes = built.model.recipes()
    tables = [piece.name for piece in (recipes["embed.weight"].pieces if "embed.weight" in recipes else ())]
    names = tuple(piece.name for recipe in recipes.values() for piece in recipe.pieces)
    tied = "" if TIED_HEAD in names or not tables else tables[0]
    base = Base(
        names, config.num_layers, (config.num_heads, config.num_kv_heads), moe, frozenset(map(canonical_name, tables)), tied,
        read=opened.checkpoint.read,
    )  # fmt: skip
    merging = Merging(opened.checkpoint, recipes, read_peft(folder, base=base, merging=True))
    opened = dataclasses.replace(opened, hf_config=config_of(opened.hf_config, merging))
    try:
        write_model(out, merging.tensors(), opened, dtype)
    except ValueError:
        shutil.rmtree(out, ignore_errors=True)
        raise
    write_text_side(out, opened, load_text_side(source).tokenizer, None)
    for name in TOKENIZER_FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    return merging.num_changed


def main() -> None:
    """Command line; exits with 1 and a sentence where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m serving.convert", description=__doc__)
    parser.add_argument("--model", help="GGUF file, directory or hub id; default: the default model")
    parser.add_argument("--out", type=Path, required=True, help="directory to write; must not exist")
    parser.add_argument(
        "--adapter", help="merge this adapter (a directory or hub id) into the model; writes safetensors"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    parser.add_argument("--mesh", help='lay out for this mesh, e.g. "model=4" (default: one device)')
    parser.add_argument("--cpu-devices", type=int, help="make this many CPU devices, to lay out for a mesh without one")
    arguments = parser.parse_args()
    if arguments.cpu_devices:
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", arguments.cpu_devices)
    if arguments.adapter and (arguments.mesh or arguments.cpu_devices):
        parser.error("--adapter writes safetensors, which lie for no mesh: leave --mesh and --cpu-devices out.")
    try:
        if arguments.adapter:
            changed = merge(arguments.model, arguments.adapter, arguments.out, dtype=arguments.dtype)
            print(f"{changed} weights changed by {arguments.adapter}.")
        else:
            convert(arguments.model, arguments.out, dtype=arguments.dtype, mesh=arguments.mesh)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"Written: {arguments.out}. Serve it with --model {arguments.out}")


if __name__ == "__main__":
    main()
