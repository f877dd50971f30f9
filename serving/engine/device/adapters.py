"""LoRA adapters on the devices: the stacks of their matrices beside the decoder's weights, and the programs that use them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.adapters.attach import AUTO, attach
from serving.engine.device.components import Component
from serving.engine.device.programs.compiling import Program
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.program_list import StepShapes, hidden_width, with_leaves
from serving.engine.device.programs.steps import (
    PROMPT_LOGPROB_ROWS,
    make_load_adapter,
    make_prompt_logprobs,
    make_sample,
    used_leaves,
)
from serving.engine.device.stores.at_rest import delete

VARIANT = "with adapters"
"""Of forward programs in which somebody has an adapter, and of those that make logits where an adapter changes them. Steps in which
nobody has one run the plain ones."""


class Adapters:
    """Room for adapters in a decoder.

    Args:
        decoder: the component, split before: its own leaves stay what they are.
        model: its module, which gets the stacks.
        slots, max_rank: adapters at once, and their rank at most.
        dtype: of their matrices, as `attach`'s.

    Attributes:
        room: which weights adapters may change, and how their matrices are packed.
        stacks: the matrices of all slots, flat; donated to what loads an adapter.
    """

    def __init__(
        self,
        decoder: Component,
        model: Any,
        slots: int,
        max_rank: int,
        mesh: jax.sharding.Mesh | None,
        dtype: str = AUTO,
    ) -> None:
        self._decoder = decoder
        self.room = attach(model, slots, max_rank, mesh, dtype=dtype)
        self._split, self.stacks, self._places = decoder.split.with_adapters(model)
        self._cut = tuple(stack.sharding for stack in self.stacks)
        self._head: list[int] = []
        self._asleep: list[tuple[tuple[int, ...], Any, Any]] = []

    def keep(self, stacks: tuple[jax.Array, ...]) -> None:
        """Uses what a load gave, cut over the devices as before: a program's results are whole on every device."""
        self.stacks = tuple(jax.device_put(new, place) for new, place in zip(stacks, self._cut, strict=True))

    @property
    def leaves(self) -> tuple[Any, ...]:
        """What forward programs with adapters are called with: the decoder's weights, then the stacks."""
        return self._decoder.leaves + self.stacks

    @property
    def head_leaves(self) -> tuple[Any, ...]:
        """What programs that make logits with adapters are called with."""
        leaves = self.leaves
        return tuple(leaves[i] for i in self._head)

    def programs(self, cache: tuple[Any, ...], state: Any, shapes: StepShapes) -> list[Program]:
        """Forward passes in which somebody has an adapter, logits that an adapter changes, and what loads one.

        Args:
            cache, state: ShapeDtypeStructs of one replica's pages (and recurrent states), and device state.
        """
        stacks = tuple(jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=s.sharding) for s in self.stacks)
        packed, slot = jax.ShapeDtypeStruct((self.room.size,), jnp.float32), jax.ShapeDtypeStruct((), jnp.int32)
        load = make_load_adapter(self.room, self._places)
        programs = [Program(ProgramKey("load_adapter"), load, (stacks, slot, packed), (0,))]
        for bucket in shapes.forward_layouts:
            fn = shapes.make_forward(self._split, bucket)
            args = (self._decoder.abstract_leaves + stacks, cache, state.ends, *shapes.forward_args(bucket))
            programs.append(Program(ProgramKey("forward", bucket, VARIANT), fn, args, (1,), (0,), True))
        return [*programs, *self._logits(self._decoder.abstract_leaves + stacks, cache, state, shapes)]

    def _logits(self, leaves: tuple[Any, ...], cache: tuple[Any, ...], state: Any, shapes: StepShapes) -> list[Program]:
        """Programs that make logits which an adapter changes."""
        if not self.room.late:
            return []
        width = hidden_width(self._decoder.split, self._decoder.abstract_leaves, cache, shapes)

        def ints(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.int32)

        def hidden(rows: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((rows, width.shape[-1]), width.dtype)

        rows = ints(PROMPT_LOGPROB_ROWS)
        self._head = used_leaves(
            lambda given, h, own: self._split.merge(given).logits(h, own), leaves, hidden(PROMPT_LOGPROB_ROWS), rows
        )
        head, wrap = tuple(leaves[i] for i in self._head), with_leaves(self._head, len(leaves))
        programs = []
        for size, layout in shapes.sample_layouts.items():
            fn = wrap(make_sample(self._split, layout, shapes.sizes.draft_tokens))
            args = (head, state, hidden(size), ints(layout.size), ints(size, shapes.mask_width))
            programs.append(Program(ProgramKey("sample", size, VARIANT), fn, args, (1,), (0,)))
        for tokens in shapes.buckets.chunk_sizes:
            fn = wrap(make_prompt_logprobs(self._split))
            args = (head, hidden(tokens), rows, rows, rows)
            programs.append(Program(ProgramKey("prompt_logprobs", tokens, VARIANT), fn, args, shared=(0,)))
        return programs

    def sleep(self) -> None:
        """Gives the devices' memory back. Who runs with an adapter when the engine is awake has it loaded anew."""
        self._asleep = [(stack.shape, stack.dtype, stack.sharding) for stack in self.stacks]
        delete(self.stacks)

    def wake(self) -> None:
        """Takes it again, with nothing in it."""
        self.stacks = tuple(jax.device_put(np.zeros(shape, dtype), at) for shape, dtype, at in self._asleep)
