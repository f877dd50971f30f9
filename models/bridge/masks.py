"""What stands where a model's masks of attention would while it is recorded: each says which positions are seen, and becomes a
tensor only for a model that computes its scores itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from models.bridge.graph import Refused
from models.bridge.record import options


class Mask:
    """The mask of tokens, which all attend to what is before them.

    Handed to attention of ours it says what is seen. Whoever computes with it, or asks for its shape, gets a tensor [1, 1, T, T] of
    zeros and the least number in its place; `written_out.py` finds out what is made of that.
    """

    def __init__(self, like: Any, window: int | None = None, chunk: int | None = None) -> None:
        self.window, self.chunk = window, chunk
        self._like, self._made = like, None

    def tensor(self) -> torch.Tensor:
        """As numbers that are added to scores."""
        if not isinstance(self._like, torch.Tensor):
            raise Refused("its layers change the mask of attention themselves")
        if self._made is None:
            self._made = torch.ops.jaxserve.mask(self._like, options(window=self.window, chunk=self.chunk))
        return self._made

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        tokens = self._like.shape[1] if isinstance(self._like, torch.Tensor) else None
        whole = (slice(None), slice(0, None), slice(None, tokens), slice(0, tokens))
        parts = index if isinstance(index, tuple) else (index,)
        return self if all(part is Ellipsis or part in whole for part in parts) else self.tensor()[index]

    def __iter__(self) -> Any:
        raise Refused("its layers change the mask of attention themselves")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*_tensors(args), **{name: _tensors(value) for name, value in (kwargs or {}).items()})


def _arithmetic(name: str) -> Any:
    return lambda self, *others: getattr(self.tensor(), name)(*_tensors(others))


for _name in (
    "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "lt", "le", "gt", "ge", "and", "rand", "or", "ror", "invert",
):  # fmt: skip
    setattr(Mask, f"__{_name}__", _arithmetic(f"__{_name}__"))


def _tensors(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_tensors(part) for part in value)
    return value.tensor() if isinstance(value, Mask) else value


def causal(config: Any, *args: Any, **told: Any) -> Mask:
    """In place of transformers' function: all positions before."""
    _no_more(told)
    return Mask(_embeddings(args, told))


def windowed(config: Any, *args: Any, **told: Any) -> Mask:
    """In place of transformers' function: those within a window."""
    _no_more(told)
    window = told.get("sliding_window") or getattr(config, "sliding_window", None)
    if not isinstance(window, int):
        raise Refused("its masks have a window of no known size")
    return Mask(_embeddings(args, told), window)


def chunked(config: Any, *args: Any, **told: Any) -> Mask:
    """In place of transformers' function: those of a token's own piece."""
    _no_more(told)
    return Mask(_embeddings(args, told), chunk=config.attention_chunk_size)


def both_ways(*_: Any, **__: Any) -> Any:
    """In place of transformers' functions for encoders.

    Raises:
        Refused: always.
    """
    raise Refused("its attention looks at later positions too")


def _embeddings(args: tuple[Any, ...], told: Mapping[str, Any]) -> Any:
    return told.get("inputs_embeds", told.get("input_embeds", args[0] if args else None))


def _no_more(told: Mapping[str, Any]) -> None:
    for name in ("or_mask_function", "and_mask_function", "block_sequence_ids", "allow_is_bidirectional_skip"):
        if told.get(name) is not None and told.get(name) is not False:
            raise Refused("it adds to the mask of attention")
