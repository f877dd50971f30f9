"""LoRA adapters on the devices: the stacks of their matrices beside the decoder's weights, and the programs that use them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.adapters.attach import attach
from serving.engine.device.components import Component
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.program_list import StepShapes
from serving.engine.device.programs.steps import make_forward, make_load_adapter
from serving.engine.device.stores.at_rest import delete

VARIANT = "with adapters"
"""Of forward programs in which somebody has an adapter. Steps in which nobody has one run the plain ones."""


class Adapters:
    """Room for adapters in a decoder.

    Args:
        decoder: the component, split before: its own leaves stay what they are.
        model: its module, which gets the stacks.
        slots, max_rank: adapters at once, and their rank at most.

    Attributes:
        room: which weights adapters may change, and how their matrices are packed.
        stacks: the matrices of all slots, flat; donated to what loads an adapter.
    """

    def __init__(
        self, decoder: Component, model: Any, slots: int, max_rank: int, mesh: jax.sharding.Mesh | None
    ) -> None:
        self._decoder = decoder
        self.room = attach(model, slots, max_rank, mesh)
        self._split, self.stacks, self._places = decoder.split.with_adapters(model)
        self._asleep: list[tuple[tuple[int, ...], Any]] = []

    @property
    def leaves(self) -> tuple[Any, ...]:
        """What forward programs with adapters are called with: the decoder's weights, then the stacks."""
        return self._decoder.leaves + self.stacks

    def programs(self, cache: tuple[Any, ...], state: Any, shapes: StepShapes) -> list[Program]:
        """Forward passes in which somebody has an adapter, and what loads one.

        Args:
            cache, state: ShapeDtypeStructs of one replica's pages (and recurrent states), and device state.
        """
        stacks = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding) for s in self.stacks)
        packed, slot = jax.ShapeDtypeStruct((self.room.size,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        load = make_load_adapter(self.room, self._places)
        programs = [Program(ProgramKey("load_adapter"), load, (stacks, slot, packed), (0,))]
        for bucket, layout in shapes.forward_layouts.items():
            fn = make_forward(self._split, shapes.groups, layout, shapes.sizes.page_size, bucket.chunk > 0)
            flat = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
            args = (self._decoder.abstract_leaves + stacks, cache, state.ends, flat)
            programs.append(Program(ProgramKey("forward", bucket, VARIANT), fn, args, (1,), (0,), True))
        return programs

    def sleep(self) -> None:
        """Gives the devices' memory back. Who runs with an adapter when the engine is awake has it loaded anew."""
        self._asleep = [(stack.shape, stack.sharding) for stack in self.stacks]
        delete(self.stacks)

    def wake(self) -> None:
        """Takes it again, with nothing in it."""
        self.stacks = tuple(jax.device_put(np.zeros(shape, np.float32), at) for shape, at in self._asleep)
