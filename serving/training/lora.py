"""Low-rank pairs to learn: which weights get one, how it starts, and how those of one parameter become one change of its product.

A pair belongs to a tensor of the checkpoint, as in the files that `peft` writes; a parameter may be several tensors in one (q, k
and v). Its A matrices are stacked, and each row of its B has values in the columns of the tensor that it is of, so one narrow
product each serves all of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers import Embedding, Linear
from models.layers.moe import Experts
from models.parameters import parameters_of
from models.recipes import Recipe
from ops.linear.weights.trained import Change

ALL_LINEAR = "all-linear"
NOT_LINEAR = ("router", "shared_gate")
"""Of a layer's products those that `all-linear` leaves alone: what chooses experts. Nothing outside of layers is one of them."""


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """What is learned, in peft's words.

    Attributes:
        rank, alpha, dropout, rslora: r, lora_alpha, lora_dropout, use_rslora.
        targets: target_modules: "all-linear", a regular expression for the whole path, or names.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    rslora: bool = False
    targets: str | tuple[str, ...] = ALL_LINEAR

    @property
    def scale(self) -> float:
        """What B A is multiplied by; rsLoRA (Kalajdzievski 2023, arXiv:2312.03732) divides by the rank's root."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    def takes(self, module: str, path: str) -> bool:
        """Whether a module of the checkpoint ("model.layers.0.mlp.up_proj"), or its parameter's path, is one of the targets."""
        if isinstance(self.targets, str):
            if self.targets == ALL_LINEAR:
                return path.startswith("layers.") and path.split(".")[-2] not in NOT_LINEAR
            return re.fullmatch(self.targets, module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.targets)


@dataclasses.dataclass(frozen=True)
class Site:
    """A parameter that pairs change.

    Attributes:
        path: of the parameter.
        linear: it is multiplied with as it is; else it is changed before it is used.
        names: tensors of the checkpoint that have a pair, in the order of their columns.
        sizes: (outputs, inputs) of each.
        starts: where each one's rows begin among the rows of all tensors in the parameter.
        total: how many rows those have.
        order_O: which of them each row of the parameter is; None where that is its own number.
        inverse: the other way; None where a row is in several places or none.
        columns_I: of A, where the parameter's columns are placed otherwise than the checkpoint's: from 1, 0 for none.
    """

    path: str
    linear: bool
    names: tuple[str, ...]
    sizes: tuple[tuple[int, int], ...]
    starts: tuple[int, ...]
    total: int
    order_O: np.ndarray | None
    inverse: np.ndarray | None
    columns_I: np.ndarray | None


def sites(model: Any, settings: LoraSettings) -> tuple[Site, ...]:
    """Where pairs go.

    Raises:
        ValueError: the targets fit nothing, or something that cannot be changed so.
    """
    recipes: dict[str, Recipe] = model.recipes()
    parameters = dict(parameters_of(model))
    kinds = {".".join(map(str, path)): type(module) for path, module in nnx.iter_modules(model)}
    found, seen, refused = [], [], []
    for path, recipe in recipes.items():
        kind = kinds.get(path.rpartition(".")[0], nnx.Module)
        if len(parameters[path].shape) < 2 or issubclass(kind, Embedding):
            continue
        names = tuple(piece.name for piece in recipe.pieces)
        modules = [name.removesuffix(".weight") for name in names]
        mine = [settings.takes(module, path) for module in modules]
        seen += modules
        if not any(mine):
            continue
        if issubclass(kind, Experts) or not recipe.by_rows or any(len(piece.shape) != 2 for piece in recipe.pieces):
            refused += [module for module, taken in zip(modules, mine, strict=True) if taken]
            continue
        linear = issubclass(kind, Linear)
        found.append(_site(path, recipe, parameters[path], linear, [n for n, t in zip(names, mine, strict=True) if t]))
    if refused and settings.targets != ALL_LINEAR:
        raise ValueError(f"--lora-targets: {refused[0]} (and {len(refused) - 1} more) cannot be changed by pairs.")
    if not found:
        leaves = sorted({module.rpartition(".")[2] for module in seen})
        raise ValueError(
            f"--lora-targets {settings.targets!r} fits no weight of this model; its modules are {', '.join(leaves)}."
        )
    return tuple(found)


def _site(path: str, recipe: Recipe, parameter: Any, linear: bool, names: Sequence[str]) -> Site:
    pieces = recipe.pieces
    starts = dict(zip((p.name for p in pieces), np.cumsum([0, *(p.num_rows for p in pieces)]).tolist(), strict=False))
    by_name = {piece.name: piece for piece in pieces}
    total = sum(piece.num_rows for piece in pieces)
    order_O = recipe.arrange(lambda piece: np.arange(piece.num_rows) + starts[piece.name])
    spread, columns_I = parameter.get_metadata().get("spread"), None
    if spread is not None and spread.part == "out":
        columns_I = spread.apply(np.arange(1, pieces[0].width[0] + 1)[None])[0]
    elif spread is not None:
        order_O = spread.apply(order_O[:, None] + 1)[:, 0] - 1  # -1 for heads that are none
    whole = len(order_O) == total and np.array_equal(np.sort(order_O), np.arange(total))
    same = whole and np.array_equal(order_O, np.arange(total))
    return Site(
        path,
        linear,
        tuple(names),
        tuple((by_name[name].num_rows, by_name[name].width[0]) for name in names),
        tuple(int(starts[name]) for name in names),
        total,
        None if same else order_O,
        np.argsort(order_O) if whole else None,
        columns_I,
    )


Pairs = dict[str, dict[str, Any]]
"""Name of a tensor -> {"a": [r, I], "b": [O, r]}, float32."""


def start(sites: Sequence[Site], settings: LoraSettings, seed: int) -> Pairs:
    """Pairs that change nothing yet: A uniform within 1 / sqrt(I), B zero, as peft starts."""
    key, pairs = jax.random.key(seed), {}
    for name, (outputs, inputs) in sorted(sized(sites)):
        bound = inputs**-0.5
        a = jax.random.uniform(jax.random.fold_in(key, len(pairs)), (settings.rank, inputs), jnp.float32, -bound, bound)
        pairs[name] = {"a": a, "b": jnp.zeros((outputs, settings.rank), jnp.float32)}
    return pairs


def sized(sites: Sequence[Site]) -> set[tuple[str, tuple[int, int]]]:
    """(tensor, (outputs, inputs)) of every pair; one may be in two parameters."""
    return {item for site in sites for item in zip(site.names, site.sizes, strict=True)}


def changes(
    sites: Sequence[Site], pairs: Mapping[str, Mapping[str, jax.Array]], settings: LoraSettings, dtype: Any, key: Any
) -> Iterator[tuple[Site, Change]]:
    """Each parameter's change in a step, in the dtype of its product. A parameter that is changed before it is used has no
    dropout: there is no input to drop."""
    for index, site in enumerate(sites):
        a_RI = jnp.concatenate([pairs[name]["a"] for name in site.names])
        if site.columns_I is not None:
            a_RI = jnp.where(site.columns_I > 0, a_RI[:, np.maximum(site.columns_I - 1, 0)], 0.0)
        own = jax.random.fold_in(key, index) if settings.dropout > 0 and site.linear and key is not None else None
        yield (
            site,
            Change(
                a_RI.astype(dtype),
                (_rows_of_b(site, pairs, settings.rank).T * settings.scale).astype(dtype),
                own,
                settings.dropout if own is not None else 0.0,
            ),
        )


def _rows_of_b(site: Site, pairs: Mapping[str, Mapping[str, jax.Array]], rank: int) -> jax.Array:
    """B [O, R] with the parameter's rows."""
    R = rank * len(site.names)
    parts, at = [], 0
    for index, (name, first) in enumerate(zip(site.names, site.starts, strict=True)):
        b_Or = pairs[name]["b"]
        parts.append(jnp.zeros((first - at, R), b_Or.dtype))
        parts.append(jnp.pad(b_Or, ((0, 0), (index * rank, R - (index + 1) * rank))))
        at = first + len(b_Or)
    parts.append(jnp.zeros((site.total - at, R), parts[-1].dtype))
    b_NR = jnp.concatenate(parts)
    if site.order_O is None:
        return b_NR
    if site.inverse is not None:
        return _permuted(b_NR, site.order_O, site.inverse)
    return jnp.where((site.order_O >= 0)[:, None], b_NR[np.maximum(site.order_O, 0)], 0.0)


def _permuted(x: jax.Array, order: np.ndarray, inverse: np.ndarray) -> jax.Array:
    """x[order], whose gradient is gathered too: XLA's CPU scatter goes number by number."""

    @jax.custom_vjp
    def permuted(x: jax.Array) -> jax.Array:
        return x[order]

    permuted.defvjp(lambda x: (x[order], None), lambda _, dy: (dy[inverse],))
    return permuted(x)


def names_of(tensors: Iterable[str]) -> list[str]:
    """The last parts of modules' names, each once, sorted: what `target_modules` of a file lists."""
    return sorted({name.removesuffix(".weight").rpartition(".")[2] for name in tensors})
