"""The models of an engine. The decoder is the first, and the one that every engine has; a draft, or what reads images or sound,
stands beside it: its own weights and its own programs, in the same executor and the same order of commands."""

from __future__ import annotations

import functools
from typing import Any

import jax

from serving.engine.device.programs.steps import SplitModel
from serving.engine.device.stores.at_rest import Rested, check_fit, delete, to_devices, to_host


class Component:
    """One model on one mesh: its weights, and which of them its programs read.

    Args:
        name: `ProgramKey.component` of its programs.
        model: an nnx.Module, weights on their devices.

    Attributes:
        split: the model as a function of its leaves.
        leaves: the weights. Replaced as a whole: steps in flight keep those they were given.
        head: which of the leaves its logits read; set when its programs are listed.
    """

    def __init__(self, name: str, model: Any) -> None:
        self.name = name
        self.split, self.leaves = SplitModel.split(model)
        self.head: list[int] = []
        self._asleep: Rested = []

    @property
    def abstract_leaves(self) -> Any:
        """Shapes and places of the weights."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.leaves)

    @functools.cached_property
    def head_leaves(self) -> tuple[Any, ...]:
        """What programs that make logits are called with."""
        return tuple(self.leaves[i] for i in self.head)

    @property
    def own(self) -> tuple[Any, ...]:
        """The weights that are no other component's."""
        return self.leaves

    def leaves_of(self, model: Any) -> tuple[Any, ...]:
        """The weights of another checkpoint, checked to fit this model's programs.

        Raises:
            ValueError: another structure, shape, dtype or placement, in a sentence.
        """
        _, leaves = SplitModel.split(model)
        check_fit(leaves, self.leaves)
        return leaves

    def replace(self, leaves: tuple[Any, ...]) -> None:
        """Uses other weights from the next program on; see `leaves_of`."""
        self.leaves = leaves
        self.__dict__.pop("head_leaves", None)

    def sleep(self, keep: bool) -> None:
        """Gives the devices' memory back; the weights are kept in host memory, or lost."""
        if keep:
            self._asleep = to_host(self.leaves)
        self.__dict__.pop("head_leaves", None)
        delete(self.leaves)

    def wake(self, leaves: tuple[Any, ...] | None = None) -> None:
        """Takes the devices' memory again.

        Args:
            leaves: the weights, where `sleep` did not keep them.
        """
        if leaves is None:
            leaves = to_devices(self._asleep)
        self._asleep = []
        self.replace(leaves)

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.leaves))

    @property
    def num_parameters(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.leaves))


class Beside(Component):
    """A model some of whose weights are another component's: they are whatever that one's are, and it alone may replace them."""

    def __init__(self, name: str, model: Any, other: Component) -> None:
        self._own: tuple[jax.Array, ...] = ()
        self._links: dict[int, int] = {}
        super().__init__(name, model)
        at = {id(leaf): index for index, leaf in enumerate(other.leaves)}
        self._other = other
        links = {i: at[id(leaf)] for i, leaf in enumerate(self._own) if id(leaf) in at}
        self._own = tuple(leaf for i, leaf in enumerate(self._own) if i not in links)
        self._links = links

    @property
    def leaves(self) -> tuple[jax.Array, ...]:
        """All of them, in the model's order."""
        links = self._links
        own, count = iter(self._own), len(self._own) + len(links)
        return tuple(self._other.leaves[links[i]] if i in links else next(own) for i in range(count))

    @leaves.setter
    def leaves(self, own: tuple[jax.Array, ...]) -> None:
        self._own = own

    @property
    def own(self) -> tuple[Any, ...]:
        return self._own

    def sleep(self, keep: bool) -> None:
        if keep:
            self._asleep = to_host(self._own)
        delete(self._own)
