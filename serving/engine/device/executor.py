"""The device side of an engine: owns weights, pages, device state and compiled programs, and carries out commands.

Every process of an engine has one, and all are given the same commands in the same order. Nothing here waits for a device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from models.api import KVCache
from ops import native, paged_attention
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineRequest
from serving.engine.device.adapters import VARIANT, Adapters
from serving.engine.device.components import Component
from serving.engine.device.draft import FORWARD, SAMPLE, DraftModel
from serving.engine.device.followers import Followers, Meet
from serving.engine.device.head import HeadModel
from serving.engine.device.media import VisionTower
from serving.engine.device.programs.compiling import (
    CompileGuard,
    Program,
    ProgramCache,
    compile_all,
    rehearsing,
    starting,
)
from serving.engine.device.programs.keys import DECODER, DRAFT, VISION, ProgramKey
from serving.engine.device.programs.placement import BY_REPLICA, EVERYWHERE, num_replicas, of_one, place, placed
from serving.engine.device.programs.program_list import StepShapes, list_programs
from serving.engine.device.programs.state import DeviceState, slot_rows
from serving.engine.device.programs.steps import PROMPT_LOGPROB_ROWS
from serving.engine.device.stores.at_rest import delete
from serving.engine.device.stores.page_store import Lent, PageStore
from serving.engine.device.stores.state_store import StateStore
from serving.engine.device.timing import empty_step, time_steps, worth_a_run
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.cache_specs import recurrent_of
from serving.engine.requests.commands import (
    CatchUp,
    ClearStates,
    Command,
    DecodeLoop,
    Draft,
    Encode,
    Forward,
    LoadAdapter,
    LoadSlot,
    LoadStates,
    PagesDropped,
    PagesIn,
    PagesOut,
    Pool,
    PromptLogprobs,
    Sample,
    SaveStates,
)  # fmt: skip
from serving.engine.requests.moves import PageMove, StateMove
from serving.engine.requests.request import Request
from serving.engine.requests.sizes import Sizes
from serving.engine.requests.slots import SlotTable


class Executor:
    """One model on one mesh.

    Args:
        model: an nnx.Module implementing models.api.CausalLM, weights on their devices.
        sizes: resolved sizes.
        cache: where executables are kept.
        attention_backend: force one implementation of paged attention.
        num_scheduler_steps: compile decode loops of up to this many steps, when more than 1.
        host_tier: compile what moves pages to host memory and back.
        travel: also what moves pages and snapshots to other engines and from them.
        adapter_slots, max_lora_rank, lora_dtype: adapters at once, their rank at most, what they are kept as; none where 0.
        draft: a model that guesses what this one says, as `model`; or a head of this one, models.heads.Head.
        tower: what reads images, or sound.

    Attributes:
        decoder: the first of `components`, whose pages and device state the executor keeps.
        components: the models of this engine, by name.
        groups: which layers share pages.
        recurrent: what the model's recurrent layers keep a slot; None where there are none.
        guard: counts compilations after start.
        num_sampled: commands so far that sampled tokens.
        replicas: how many replicas the mesh holds; sizes, buckets and layouts are of one.
        step_seconds: what steps without chunks took at start, with nothing in them; measured where there are drafts.
    """

    def __init__(
        self,
        model: Any,
        sizes: Sizes,
        cache: ProgramCache,
        *,
        mesh: jax.sharding.Mesh | None = None,
        attention_backend: str | None = None,
        host_tier: bool = False,
        travel: bool = False,
        num_scheduler_steps: int = 1,
        adapter_slots: int = 0,
        lora_dtype: str = "auto",
        max_lora_rank: int = 16,
        draft: Any = None,
        tower: VisionTower | None = None,
    ) -> None:
        self.sizes = sizes
        self.vocab_size = model.vocab_size
        self.tower = tower
        taps, media = getattr(draft, "taps", None), None if tower is None else tower.shape
        self._shapes = StepShapes.of(sizes, model, adapter_slots > 0, taps, media)
        self.groups = self._shapes.groups
        self.buckets = self._shapes.buckets
        self.mask_width = self._shapes.mask_width
        self.forward_layouts = self._shapes.forward_layouts
        self.sample_layouts = self._shapes.sample_layouts
        self.guard = CompileGuard()
        self.num_sampled = 0
        self.step_seconds: tuple[tuple[Bucket, float], ...] = ()
        self.replicas = num_replicas(mesh)
        self.recurrent = recurrent_of(model)
        self.states: StateStore | None = None
        if self.recurrent is not None:
            self.states = StateStore(self.recurrent, sizes.max_num_seqs, sizes.num_snapshots, mesh, self.replicas)
        self._followers: Followers | None = None
        self._cache = cache
        self._mesh = self.mesh = mesh
        self._backend = attention_backend
        self.decoder = Component(DECODER, model)
        self.components = {DECODER: self.decoder}
        self.draft: DraftModel | None = None
        if draft is not None:  # before there is room for adapters: drafts are the base's
            hears = self._shapes.taps is not None
            self.draft = (
                HeadModel(draft, self._shapes, mesh, self.decoder) if hears else DraftModel(draft, self._shapes, mesh)
            )
            self.components[DRAFT] = self.draft.component
        self.adapters = None
        if adapter_slots:
            self.adapters = Adapters(self.decoder, model, adapter_slots, max_lora_rank, mesh, lora_dtype)
        if tower is not None:
            self.components[VISION] = tower.component
        self._kv: Any = None
        self._state: Any = None
        self.reset_cache()
        by_replica = BY_REPLICA if self.replicas > 1 else EVERYWHERE
        self._no_mask = {
            s: place(mesh, jnp.zeros((self.replicas * s, self.mask_width), jnp.int32), by_replica)
            for s in self.buckets.sample_sizes
        }
        self.programs: dict[ProgramKey, Any] = {}
        self.store = PageStore(self.replicas) if host_tier or travel else None
        self._travel = travel
        self.max_steps = num_scheduler_steps
        self._hidden_SD: Any = None  # of the last Forward, until its Sample
        self._hidden_TD: Any = None

    # ---- start ----

    def compile(self, on_done: Callable[[int, int], None] | None = None, meet: Meet | None = None) -> None:
        """Compiles every program, runs each once on padding, and arms the guard.

        Args:
            on_done: told (how many are compiled, of how many).
            meet: with several processes, `Followers.least`: each compiles and warms up for itself, but all together.
        """
        with paged_attention.use_backend(self._backend):
            programs = self._list_programs()
            agree = None if meet is None else lambda found: bool(meet("programs found", int(found)))
            self.programs = compile_all(programs, self._cache, on_done, agree)
        if self.store is not None:
            self.store.bind(self.programs)
        if self.states is not None:
            self.states.bind(self.programs)
        for part in (self.draft, self.tower):
            if part is not None:
                part.bind(self.programs)
        if meet is not None:
            meet("programs compiled", 1)  # the first collective must not wait for a process that compiles
        with rehearsing():
            self._warm_up()
        self.guard.arm()
        self.num_sampled = 0

    def lead(self, followers: Followers) -> None:
        """From now on, other processes are sent what is executed here."""
        self._followers = followers

    def _list_programs(self) -> list[Program]:
        cache, state = self._one((self._cached, self._state))
        more = [] if self.store is None else self.store.programs(self._one(self._pages))
        more += [] if self.draft is None else self.draft.programs(state.ends)
        more += [] if self.tower is None else self.tower.programs()
        more += [] if self.states is None else self.states.programs(self._travel)
        more += [] if self.adapters is None else self.adapters.programs(cache, state, self._shapes)
        weights = self.decoder.abstract_leaves
        listed = list_programs(self.decoder.split, weights, cache, state, self._shapes, self.max_steps, more)
        self.decoder.head = listed.head
        return [placed(self._mesh, program) for program in listed.programs]

    def _one(self, tree: Any) -> Any:
        """What one replica sees of arrays."""
        return jax.tree.map(lambda array: of_one(self._mesh, array), tree)

    def _warm_up(self) -> None:
        """Runs programs once, so that the first request is as fast as the tenth (first calls allocate and page in).

        In a rehearsal of the native kernels, whose products would be nearly all of it.
        """
        slots = SlotTable(self.sizes.max_num_seqs, self._shapes.pages_per_slot, groups=len(self.groups.windows))
        rows = np.zeros(self.replicas * PROMPT_LOGPROB_ROWS, np.int32)
        late = self.adapters is not None and bool(self.adapters.room.late)
        for bucket in worth_a_run(self.buckets, jax.default_backend()):
            draft, forward, sample = empty_step(self._shapes, self.replicas, self.draft, bucket, slots)
            if draft is not None:
                self.execute(draft)
            if self.adapters is not None:
                self.execute(dataclasses.replace(forward, adapted=True))
            self.execute(forward)
            if bucket.chunk:
                self.execute(PromptLogprobs(bucket.tokens, rows, rows))
                if late:
                    self.execute(PromptLogprobs(bucket.tokens, rows, rows, rows))
                self.execute(Pool(np.zeros((self.replicas * self.buckets.max_rows, bucket.tokens), np.float32)))
            if late:
                self.execute(dataclasses.replace(sample, adapted=True))
                self.execute(forward)
            self.execute(sample)
            if ProgramKey("decode_loop", bucket) in self.programs:
                self.execute(DecodeLoop(bucket, forward.packed, sample.packed, 2))
        if self.store is not None:
            null = [PageMove(replica, 0, b"") for replica in range(self.replicas)]
            self.execute(PagesOut.of(null))
            self.execute(PagesIn.of(null))
            self.execute(PagesDropped.of([(replica, key) for replica, _, key in null]))
        if self.states is not None:
            nowhere = [StateMove(replica, self.sizes.max_num_seqs, 0) for replica in range(self.replicas)]
            for command in (ClearStates, SaveStates, LoadStates):
                self.execute(command.of(nowhere))
            if self._travel:
                self.states.write(0, 0, self.states.lend(0, 0)())
        if self.adapters is not None:
            self.execute(LoadAdapter(0, np.zeros(self.adapters.room.size, np.float32)))
        for encode in () if self.tower is None else self.tower.empty():
            self.execute(encode)
        if self.sizes.draft_tokens:
            empty = functools.partial(empty_step, self._shapes, self.replicas, self.draft, slots=slots)
            shapes = [bucket for bucket in self.buckets.buckets if not bucket.chunk]
            with native.rehearsal(False):
                self.step_seconds = tuple(
                    time_steps(shapes, empty, self.execute, lambda: jax.block_until_ready(self._state))
                )
        neutral = slot_rows(Request(EngineRequest("", (0,), SamplingParams()), 0), self.vocab_size)
        self.execute(LoadSlot(0, self.sizes.max_num_seqs, *neutral))
        jax.block_until_ready(self._state)

    # ---- commands ----

    def execute(self, command: Command) -> Any:
        """Starts one program.

        Returns:
            what the host may read, replicas end to end: SampleOutput of Sample, LoopOutput of DecodeLoop
            (`programs`); float32 [R, D] of Pool; (logprob, rank, top_ids, top_values) of PromptLogprobs; None of the others,
            but of Forward int32 [layers, E], how many tokens visited each expert, where the model has some.
        """
        if self._followers is not None:
            self._followers.send(command)
        match command:
            case Forward(bucket, packed, adapted, drafted):
                if drafted:
                    packed = self._draft.put(FORWARD, bucket, packed)
                key, leaves = ProgramKey("forward", bucket), self.decoder.leaves
                if adapted:
                    assert self.adapters is not None, "no request can have an adapter"
                    key, leaves = ProgramKey("forward", bucket, VARIANT), self.adapters.leaves
                store = (self.tower.store_MD,) if self.tower is not None and self.tower.shape.read_in(bucket) else ()
                self._cached, out = self.programs[key](leaves, self._cached, self._state.ends, packed, *store)
                self._hidden_SD, self._hidden_TD = out.hidden_SD, out.hidden_TD
                if self.draft is not None:
                    heard = out.hidden_TD if out.tapped_TH is None else out.tapped_TH
                    self.draft.heard(bucket, packed, self._state.ends, heard)
                if out.trial is not None and self.states is not None:
                    self.states.hold(bucket, packed, out.trial)
                return out.loads[0] if out.loads else None
            case Encode():
                assert self.tower is not None, "images are taken where something reads them"
                return self.tower.encode(command)
            case Draft():
                return self._draft.draft(command)
            case CatchUp():
                return self._draft.catch_up(command, self._state.ends)
            case Sample(rows, packed, mask, drafted, adapted):
                if drafted is not None:
                    packed = self._draft.put(SAMPLE, drafted, packed)
                mask = self._no_mask[rows] if mask is None else mask
                hidden_SD, self._hidden_SD, self._hidden_TD = self._hidden_SD, None, None
                key, leaves = self._for_logits("sample", rows, adapted)
                self._state, output = self.programs[key](leaves, self._state, hidden_SD, packed, mask)
                if self.draft is not None:
                    self.draft.sampled(self._state.ends)
                if self.states is not None:
                    self.states.commit(self._state.ends)
                self._sampled_once_more()
                return output
            case DecodeLoop(bucket, forward, sample, steps):
                self._cached, self._state, tokens = self.programs[ProgramKey("decode_loop", bucket)](
                    self.decoder.leaves, self._cached, self._state, forward, sample, np.int32(steps)
                )
                self._sampled_once_more()
                return tokens
            case Pool(weights):
                return self.programs[ProgramKey("pool", command.tokens)](self._hidden_TD, weights)
            case PromptLogprobs(tokens, rows, targets, adapters):
                key, leaves = self._for_logits("prompt_logprobs", tokens, adapters is not None)
                own = () if adapters is None else (adapters,)
                return self.programs[key](leaves, self._hidden_TD, rows, targets, *own)
            case LoadAdapter(slot, packed):
                assert self.adapters is not None
                load = self.programs[ProgramKey("load_adapter")]
                self.adapters.keep(load(self.adapters.stacks, np.int32(slot), packed))
                return None
            case LoadSlot(replica, slot, seen, ids, values, banned):
                # Out of range, so nothing is written, but for the one replica.
                slots = np.full(self.replicas, self.sizes.max_num_seqs + 1, np.int32)
                slots[replica] = slot
                self._state = self.programs[ProgramKey("load_slot")](self._state, slots, seen, ids, values, banned)
                return None
            case PagesOut() | PagesIn() | PagesDropped():
                return self._move_pages(command)
            case ClearStates() | LoadStates() | SaveStates():
                assert self.states is not None, "states move where layers keep some"
                return self.states.carry_out(command)

    def _for_logits(
        self, kind: Literal["sample", "prompt_logprobs"], shape: int, adapted: bool
    ) -> tuple[ProgramKey, tuple[Any, ...]]:
        """A program that makes logits, and the weights that it reads."""
        if not adapted:
            return ProgramKey(kind, shape), self.decoder.head_leaves
        assert self.adapters is not None, "no request can have an adapter"
        return ProgramKey(kind, shape, VARIANT), self.adapters.head_leaves

    def _sampled_once_more(self) -> None:
        self.num_sampled += 1
        if self.store is not None:
            self.store.settle()

    def _move_pages(self, command: PagesOut | PagesIn | PagesDropped) -> None:
        assert self.store is not None, "pages move where there is a host tier"
        match command:
            case PagesOut():
                self.store.take_out(self._pages, command)
            case PagesIn():
                pages = self.store.put_back(self._pages, command)
                self._kv = pages[: len(self._kv)]
                if self.draft is not None:
                    self.draft.kv = pages[len(self._kv) :]
            case PagesDropped():
                self.store.drop(command)

    def lend_pages(self, moves: PagesOut) -> Lent:
        """Copies of pages for another engine, as they are behind everything that was executed; of this process alone."""
        assert self.store is not None and self.alone, "pages travel from an engine of one process"
        return self.store.lend(self._pages, moves)

    def take_pages(self, moves: PagesIn, pages: Sequence[list[np.ndarray]]) -> None:
        """Writes pages that another engine sent: of each, every array's row."""
        assert self.store is not None and self.alone, "pages travel to an engine of one process"
        for replica, key, row in zip(moves.replicas.tolist(), moves.keys, pages, strict=True):
            self.store.accept(self._pages, replica, key, row)
        self.execute(moves)
        self.store.discard(moves)

    @property
    def page_arrays(self) -> list[jax.Array]:
        """The arrays of which a page has a row each, in the order in which it travels."""
        return jax.tree.leaves(self._pages)

    @property
    def _draft(self) -> DraftModel:
        assert self.draft is not None, "nobody guesses"
        return self.draft

    @property
    def _pages(self) -> tuple[Any, ...]:
        """Pages of all components."""
        return self._kv if self.draft is None else self._kv + self.draft.kv

    # ---- memory ----

    @property
    def _cached(self) -> KVCache:
        """What a step's program takes over: pages, and states where layers keep some."""
        return self._kv if self.states is None else (*self._kv, self.states.states)

    @_cached.setter
    def _cached(self, cache: KVCache) -> None:
        if self.states is None:
            self._kv = cache
        else:
            *pages, self.states.states = cache
            self._kv = tuple(pages)

    @property
    def alone(self) -> bool:
        """Whether no other process carries out the same commands: those know nothing of what follows here."""
        return self._followers is None

    def reset_cache(self) -> None:
        """Empty pages and device state, in place of those there are or a failed program took over."""
        delete((self._kv, self._state))
        self._kv = self._state = None
        sizes = self.sizes
        with starting(), paged_attention.use_backend(self._backend):
            if self.states is not None:
                self.states.reset()
            if self.draft is not None:
                delete(self.draft.kv)
                self.draft.reset()
            if self.tower is not None:
                self.tower.reset()
            self._kv = tuple(
                paged_attention.allocate(spec, sizes.num_pages, sizes.page_size, jnp.dtype(sizes.kv_dtype), self._mesh)
                for spec in self.groups.arrays
            )
            rows = self.replicas * (sizes.max_num_seqs + 1)
            by_replica = BY_REPLICA if self.replicas > 1 else EVERYWHERE
            self._state = place(self._mesh, DeviceState.zeros(rows - 1, self.vocab_size), by_replica)

    def leaves_of(self, model: Any) -> tuple[Any, ...]:
        """The weights of another checkpoint, checked to fit this model's programs.

        Raises:
            ValueError: another structure, shape, dtype or placement, in a sentence.
        """
        return self.decoder.leaves_of(model)

    def replace_weights(self, leaves: tuple[Any, ...]) -> None:
        """Uses other weights from the next program on; see `leaves_of`. Steps in flight keep those they were given."""
        self.decoder.replace(leaves)

    @property
    def device_bytes(self) -> int:
        """What weights, pages and state take of the devices; asked while awake."""
        states = () if self.states is None else (self.states.states, self.states.snapshots)
        weights = [component.own for component in self.components.values()]
        return sum(leaf.nbytes for leaf in jax.tree.leaves((weights, self._pages, self._state, states)))

    def sleep(self, keep_weights: bool) -> int:
        """Gives the device's memory back: pages and state are lost, weights are kept in host memory or lost too. Returns bytes
        freed."""
        jax.block_until_ready((self._kv, self._state))
        states = () if self.states is None else (self.states.states, self.states.snapshots)
        freed = self.device_bytes
        self.decoder.sleep(keep_weights)
        if self.draft is not None:  # its weights are nobody's to replace, so they are kept
            delete(self.draft.sleep(True))
        if self.tower is not None:
            freed += self.tower.sleep()
        if self.adapters is not None:
            self.adapters.sleep()
        delete((self._kv, self._state, states))
        self._kv = self._state = None
        return freed

    def wake(self, leaves: tuple[Any, ...] | None = None) -> None:
        """Takes device memory again.

        Args:
            leaves: the weights, where `sleep` did not keep them.
        """
        self.decoder.wake(leaves)
        if self.draft is not None:
            self.draft.component.wake()
        if self.tower is not None:
            self.tower.component.wake()
        if self.adapters is not None:
            self.adapters.wake()
        self.reset_cache()

    def sampled(self, number: int, tokens: np.ndarray) -> None:
        """Tells the other processes what command number `number` that sampled gave here, so that they can compare."""
        if self._followers is not None:
            self._followers.sampled(number, tokens)

    @property
    def weight_bytes(self) -> int:
        return self.decoder.weight_bytes

    @property
    def num_parameters(self) -> int:
        return self.decoder.num_parameters
