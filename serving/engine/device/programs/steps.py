"""The functions that are compiled: `forward` (one a bucket), `sample` (one a row count), `load_slot`, `prompt_logprobs`.

All are pure functions of arrays. `forward` and `sample` are apart because a grammar's mask is known only when the token
before it is: see docs/design.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from models import expert_loads
from models.adapters.attach import Room
from models.api import KVCache, Result, Step
from models.layers.linear import AdapterStack
from ops import sampling
from ops.lora import LoraStack
from ops.paged_attention.groups import KVGroups
from serving.engine.api.sampling_params import MAX_LOGPROBS
from serving.engine.device.programs.packing import Layout, adapters_of, cross_of, decode_rows, embeddings_of, make_step
from serving.engine.device.programs.state import DeviceState
from serving.engine.device.programs.trial import Trial, take_apart
from serving.engine.device.programs.verify import accept, drafts_before

PROMPT_LOGPROB_ROWS = 64
"""Positions whose full logits are in memory at once when prompt logprobs are asked for."""


@dataclasses.dataclass(frozen=True)
class SplitModel:
    """A model as a function of its flat leaves (a nested state costs 20 ms a call to flatten, a tuple 0.1).

    Attributes:
        sampler: what its programs sample with, see ops.sampling.best_body.
        mesh: that its leaves are on, when it has several devices.
        stacks: structure of the adapters' stacks, whose leaves follow the weights'; None for a model without room for any.
    """

    graphdef: Any
    treedef: Any
    sampler: sampling.Body
    mesh: Mesh | None
    stacks: Any = None

    @classmethod
    def split(cls, model: nnx.Module) -> tuple[SplitModel, tuple[jax.Array, ...]]:
        graphdef, state = nnx.split(model)
        leaves, treedef = jax.tree.flatten(state)
        places = [leaf.sharding for leaf in leaves if leaf.sharding is not None]
        platform = next(iter(places[0].device_set)).platform if places else "none"
        meshes = (place.mesh for place in places if isinstance(place, NamedSharding))
        mesh = next((mesh for mesh in meshes if isinstance(mesh, Mesh) and mesh.size > 1), None)
        return cls(graphdef, treedef, sampling.best_body(platform), mesh), tuple(leaves)

    def with_adapters(self, model: nnx.Module) -> tuple[SplitModel, tuple[jax.Array, ...], dict[str, LoraStack]]:
        """The same model with room for adapters (`models.adapters.attach`), a function of its weights and of the stacks that are
        returned, one behind the other; and of each stack's path, which of those its two are."""
        graphdef, stacks, state = nnx.split(model, AdapterStack, ...)
        leaves, treedef = jax.tree.flatten(stacks)
        assert jax.tree.structure(state) == self.treedef, "adapters are beside the weights"
        # Which leaf is which, said by the structure itself: the order of paths is nnx's business.
        numbered = nnx.to_flat_state(jax.tree.unflatten(treedef, range(len(leaves))))
        places = {".".join(map(str, path)): variable.get_value() for path, variable in numbered}
        return dataclasses.replace(self, graphdef=graphdef, stacks=treedef), tuple(leaves), places

    def merge(self, leaves: Sequence[jax.Array]) -> Any:
        if self.stacks is None:
            return nnx.merge(self.graphdef, jax.tree.unflatten(self.treedef, leaves))
        weights, stacks = leaves[: self.treedef.num_leaves], leaves[self.treedef.num_leaves :]
        merged = jax.tree.unflatten(self.treedef, weights)
        return nnx.merge(self.graphdef, jax.tree.unflatten(self.stacks, stacks), merged)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ForwardOutput:
    """What one `forward` returns besides pages; fields that nobody needs are None.

    Attributes:
        hidden_SD: of the rows that sample.
        hidden_TD: of all tokens.
        loads: for models with experts, one int32 [layers with experts, E]: how many of the step's tokens visited each.
        tapped_TH: inputs of the layers that are tapped, side by side.
        trial: of a step with drafts, what becomes of states.
    """

    hidden_SD: jax.Array
    hidden_TD: jax.Array | None = None
    loads: tuple[jax.Array, ...] = ()
    tapped_TH: jax.Array | None = None
    trial: Trial | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleOutput:
    """What one `sample` returns besides the state; the host copies only what somebody asked for.

    Attributes:
        tokens_finite: int32 [2, S]: the sampled tokens, and 1 where the row's logits were finite.
        logprob_S, rank_S, top_ids_SN, top_values_SN: as TokenLogprobs; garbage where not asked for.
    """

    tokens_finite: jax.Array
    logprob_S: jax.Array
    rank_S: jax.Array
    top_ids_SN: jax.Array
    top_values_SN: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoopOutput:
    """What one `decode_loop` returns besides pages and state.

    Attributes:
        tokens_finite: int32 [2, max_steps, B], as SampleOutput.tokens_finite; steps that did not run are -1.
        loads: for models with experts, one int32 [layers with experts, E]: how many tokens of all steps visited each.
    """

    tokens_finite: jax.Array
    loads: tuple[jax.Array, ...]


def make_forward(
    model: SplitModel,
    groups: KVGroups,
    layout: Layout,
    page_size: int,
    keep_hidden: bool,
    taps: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """forward(leaves, kv, ends, flat, *store_MD) -> (kv, ForwardOutput).

    `ends` is DeviceState.ends. `store_MD` has embeddings of images, where the engine reads some and the step has a chunk part; or
    what all tokens attend to (`MediaShape.lasting`).

    Args:
        keep_hidden: for `ForwardOutput.hidden_TD`.
        taps: layers whose inputs, side by side, are handed over for a head.
    """

    def forward(
        leaves: tuple[jax.Array, ...],
        kv: KVCache,
        ends: tuple[jax.Array, jax.Array],
        flat: jax.Array,
        store_MD: jax.Array | None = None,
    ) -> tuple[KVCache, ForwardOutput]:
        f = layout.unpack(flat)
        tokens_BQ, start_B = decode_rows(f, ends)
        step = make_step(f, tokens_BQ, start_B, groups.places, page_size)
        if model.stacks is not None:
            step = dataclasses.replace(step, adapter_T=adapters_of(f))
        if store_MD is not None:
            reads = {"cross": cross_of(f, store_MD)} if "cross_B" in f else {"embeddings": embeddings_of(f, store_MD)}
            step = dataclasses.replace(step, **reads)
        if taps:
            step = dataclasses.replace(step, taps=taps)
        merged = model.merge(leaves)
        result = merged.forward(step, kv)
        hidden_SD = rows_of(result.hidden_TD, f["sample_row_S"])
        loads = expert_counts(merged, step, result)
        tapped_TH = jnp.concatenate(result.taps, axis=-1) if taps else None
        cache, trial = result.cache, None
        if step.recurrent is not None and step.recurrent.tentative:
            cache, trial = take_apart(cache, start_B)
        return cache, ForwardOutput(hidden_SD, result.hidden_TD if keep_hidden else None, loads, tapped_TH, trial)

    return forward


def rows_of(hidden_TD: jax.Array, row_S: jax.Array) -> jax.Array:
    """The rows that sample; zeros for -1, which is padding and costs the logits' product nothing then."""
    return jnp.where((row_S >= 0)[:, None], hidden_TD[row_S], 0)


def expert_counts(model: Any, step: Step, result: Result) -> tuple[jax.Array, ...]:
    """How many of the step's tokens visited each expert, int32 [layers with experts, E]; () for models without."""
    real_T = step.real()
    if not result.visited or real_T is None:
        return ()
    return (expert_loads.count(result.visited, model.config.moe.num_experts, real_T),)


def make_sample(model: SplitModel, layout: Layout, draft_tokens: int = 0) -> Callable[..., Any]:
    """sample(leaves, state, hidden_SD, flat, mask_SW) -> (state, SampleOutput).

    `mask_SW` is int32 [S, ceil(V / 32)], read only when the flat array says `masked`. With a model that has room for adapters,
    each row's may change its logits.

    Args:
        draft_tokens: drafts that a request may have at most, where the layout has places.
    """

    def sample(
        leaves: tuple[jax.Array, ...], state: DeviceState, hidden_SD: jax.Array, flat: jax.Array, mask_SW: jax.Array
    ) -> tuple[DeviceState, SampleOutput]:
        f = layout.unpack(flat)
        merged, own = model.merge(leaves), None if model.stacks is None else f["adapter_S"]
        return sample_rows(merged, f, state, hidden_SD, mask_SW, model.sampler, model.mesh, draft_tokens, own)

    return sample


def sample_rows(
    model: Any,
    f: dict[str, jax.Array],
    state: DeviceState,
    hidden_SD: jax.Array,
    mask_SW: jax.Array | None,
    body: sampling.Body,
    mesh: Mesh | None = None,
    draft_tokens: int = 0,
    adapter_S: jax.Array | None = None,
) -> tuple[DeviceState, SampleOutput]:
    """Logits, everything that changes them, and the draw; see `make_sample`. Without `mask_SW`, no mask can be asked for.

    With `draft_tokens`, rows are places (`verify`), and the tokens of those that come to nothing are -1.
    """
    logits_SV = model.logits(hidden_SD) if adapter_S is None else model.logits(hidden_SD, adapter_S)
    if mask_SW is not None and (times := getattr(model, "first_time", None)) is not None:
        logits_SV = sampling.prefer_times(logits_SV, jnp.where(f["masked"][0] > 0, mask_SW, -1), times)
    slot_S, length_S = f["slot_S"], f["length_S"]
    place_S = f["place_S"] if draft_tokens else 0
    length_S = jnp.where(length_S < 0, state.length[slot_S] + 1 + place_S, length_S)
    rows = {name: column for name, column in f.items() if name not in _NOT_OF_DRAWS}
    rows["step_S"] = length_S - f["prompt_len_S"]  # completion tokens before the one that is drawn
    rows["finite_S"] = jnp.all(jnp.isfinite(hidden_SD), -1)
    if mask_SW is not None:
        rows["mask_SW"] = mask_SW
    if draft_tokens:
        rows["before_SK"] = drafts_before(f["draft_S"], f["place_S"], draft_tokens)
    tables = (f["masked"][0] > 0, state)
    token_S, finite_S, *logprobs = sampling.by_rows(functools.partial(_draw, body), mesh, logits_SV, rows, tables)
    # Rows without penalties write nowhere. Not under a cond: that would copy `seen`, which is megabytes.
    counted_S = _edits(rows, tables).penalized
    found_S, last_slot_S, out_of_range = token_S, slot_S, state.seen.shape[0]
    if draft_tokens:
        taken_S, last_S = accept(token_S, f["draft_S"], f["place_S"])
        counted_S &= taken_S
        found_S, last_slot_S = jnp.where(taken_S, token_S, -1), jnp.where(last_S, slot_S, out_of_range)
    state = dataclasses.replace(
        state,
        last_token=state.last_token.at[last_slot_S].set(token_S, mode="drop"),
        length=state.length.at[last_slot_S].set(length_S, mode="drop"),
        seen=state.seen.at[jnp.where(counted_S, slot_S, out_of_range), token_S].add(1, mode="drop"),
    )
    return state, SampleOutput(jnp.stack([found_S, finite_S]), *logprobs)


_NOT_OF_DRAWS = ("masked", "length_S", "prompt_len_S", "place_S", "draft_S", "adapter_S")


def _draw(
    body: sampling.Body, logits_SV: jax.Array, rows: dict[str, jax.Array], tables: tuple[jax.Array, DeviceState]
) -> tuple[jax.Array, ...]:
    """(token_S, finite_S as int32, *logprobs) of some rows."""

    def choose(edits: sampling.Edits) -> jax.Array:
        return sampling.choose(
            logits_SV,
            edits,
            temperature_R=rows["temperature_S"],
            top_k_R=rows["top_k_S"],
            top_p_R=rows["top_p_S"],
            min_p_R=rows["min_p_S"],
            seed_R2=rows["seed_S"],
            step_R=rows["step_S"],
            body=body,
        )

    edits = _edits(rows, tables)
    if "before_SK" in rows:
        before_SK = rows["before_SK"]
        behind_drafts = jnp.any(edits.penalized & (before_SK[:, 0] >= 0))
        token_S = jax.lax.cond(behind_drafts, lambda: choose(_as_if_accepted(edits, before_SK)), lambda: choose(edits))
    else:
        token_S = choose(edits)
    finite_S = rows["finite_S"] & jnp.isfinite(logits_SV[jnp.arange(token_S.shape[0]), token_S])
    logprobs = sampling.logprobs(logits_SV, token_S, MAX_LOGPROBS, rows["num_logprobs_S"] >= 0, body)
    return token_S, finite_S.astype(jnp.int32), *logprobs


def _as_if_accepted(edits: sampling.Edits, before_SK: jax.Array) -> sampling.Edits:
    """The same edits with tables of each row's own, in which the drafts before it have been generated."""
    rows, slot_S, vocab = before_SK.shape[0], edits.slot_R, edits.seen_NV.shape[1]
    ids_SK = jnp.where(before_SK < 0, vocab, before_SK)
    seen_SV = edits.seen_NV[slot_S].at[jnp.arange(rows)[:, None], ids_SK].add(1, mode="drop")
    return dataclasses.replace(
        edits,
        slot_R=jnp.arange(rows, dtype=jnp.int32),
        seen_NV=seen_SV,
        bias_ids_NE=edits.bias_ids_NE[slot_S],
        bias_values_NE=edits.bias_values_NE[slot_S],
        banned_ids_NE=edits.banned_ids_NE[slot_S],
    )


def _edits(rows: dict[str, jax.Array], tables: tuple[jax.Array, DeviceState]) -> sampling.Edits:
    """What rows ask for, from their fields of `packing.sample_layout` and (whether any is masked, the slots' facts)."""
    masked, state = tables
    return sampling.Edits(
        slot_R=rows["slot_S"],
        repetition_R=rows["repetition_S"],
        presence_R=rows["presence_S"],
        frequency_R=rows["frequency_S"],
        biased_R=rows["biased_S"] > 0,
        held_back_R=rows["step_S"] < rows["min_tokens_S"],
        masked=masked,
        seen_NV=state.seen,
        bias_ids_NE=state.bias_ids,
        bias_values_NE=state.bias_values,
        banned_ids_NE=state.banned_ids,
        mask_RW=rows.get("mask_SW"),
    )


def make_decode_loop(
    model: SplitModel, groups: KVGroups, forward: Layout, sample: Layout, page_size: int, max_steps: int
) -> Callable[..., Any]:
    """decode_loop(leaves, kv, state, forward_flat, sample_flat, steps) -> (kv, state, LoopOutput).

    Up to `steps` decode steps without the host in between; ends sooner when every row has sampled a token that ends it.
    """

    def decode_loop(
        leaves: tuple[jax.Array, ...],
        kv: KVCache,
        state: DeviceState,
        forward_flat: jax.Array,
        sample_flat: jax.Array,
        steps: jax.Array,
    ) -> tuple[KVCache, DeviceState, LoopOutput]:
        merged = model.merge(leaves)
        f, sampled = forward.unpack(forward_flat), sample.unpack(sample_flat)
        slot_B, real_B = f["decode_slot_B"], f["decode_qlen_B"] > 0
        num_rows = slot_B.shape[0]
        tokens_B1, start_B = decode_rows(f, state.ends)
        # What the host knew is the slots' from here on: every step of the loop takes up where they are.
        state = dataclasses.replace(
            state,
            last_token=state.last_token.at[slot_B].set(tokens_B1[:, 0]),
            length=state.length.at[slot_B].set(start_B),
        )
        sampled |= {"length_S": jnp.full_like(sampled["length_S"], -1)}
        stops_BN = state.banned_ids[slot_B]
        first_counted_B = (sampled["prompt_len_S"] + sampled["min_tokens_S"])[:num_rows]

        def body(carry: Any) -> Any:
            step, kv, state, ended_B, loads, out = carry
            last_token, length = state.ends
            made = make_step(f, last_token[slot_B][:, None], length[slot_B], groups.places, page_size)
            result = merged.forward(made, kv)
            counts = expert_counts(merged, made, result)
            if counts:  # a plug-in's model with experts may not say which are visited
                loads = tuple(total + count for total, count in zip(loads, counts, strict=True))
            hidden_SD = rows_of(result.hidden_TD, f["sample_row_S"])
            state, output = sample_rows(merged, sampled, state, hidden_SD, None, model.sampler, model.mesh)
            found = output.tokens_finite[:, :num_rows]
            counted_B = state.length[slot_B] + 1 >= first_counted_B
            ended_B |= counted_B & jnp.any(found[0][:, None] == stops_BN, -1)
            return step + 1, result.cache, state, ended_B, loads, out.at[:, step].set(found)

        def more(carry: Any) -> jax.Array:
            step, _, _, ended_B, _, _ = carry
            return (step < steps) & ~jnp.all(ended_B)

        out = jnp.full((2, max_steps, num_rows), -1, jnp.int32)
        counts = expert_loads.shape(merged.config)
        loads = () if counts is None else (jnp.zeros(counts, jnp.int32),)
        start = (jnp.int32(0), kv, state, ~real_B, loads, out)
        _, kv, state, _, loads, out = jax.lax.while_loop(more, body, start)
        return kv, state, LoopOutput(out, loads)

    return decode_loop


def load_slot(
    state: DeviceState,
    slot_1: jax.Array,
    seen_V: jax.Array,
    bias_ids: jax.Array,
    bias_values: jax.Array,
    banned_ids: jax.Array,
) -> DeviceState:
    """Writes one slot's rows, before the first step of a request that reads them; none for a slot out of range."""
    return dataclasses.replace(
        state,
        seen=state.seen.at[slot_1].set(seen_V, mode="drop"),
        bias_ids=state.bias_ids.at[slot_1].set(bias_ids, mode="drop"),
        bias_values=state.bias_values.at[slot_1].set(bias_values, mode="drop"),
        banned_ids=state.banned_ids.at[slot_1].set(banned_ids, mode="drop"),
    )


def make_load_adapter(room: Room, places: Mapping[str, LoraStack]) -> Callable[..., Any]:
    """load_adapter(stacks, slot, packed) -> stacks with an adapter's matrices (`Room.pack`) in a slot."""

    def load_adapter(stacks: tuple[jax.Array, ...], slot: jax.Array, packed: jax.Array) -> tuple[jax.Array, ...]:
        new = list(stacks)
        for site, matrices in zip(room.sites, room.unpack(packed), strict=True):
            own: Any = places[site.place]
            for place, matrix in zip((own.a_NRI, own.b_NRO), matrices, strict=True):
                stack = stacks[place]
                new[place] = jax.lax.dynamic_update_index_in_dim(stack, matrix.astype(stack.dtype), slot, 0)
        return tuple(new)

    return load_adapter


def make_prompt_logprobs(model: SplitModel) -> Callable[..., Any]:
    """prompt_logprobs(leaves, hidden_TD, rows, targets) -> (logprob, rank, top_ids, top_values) of PROMPT_LOGPROB_ROWS rows.

    `rows` are int32 rows of hidden_TD; `targets` the token that follows each. With a model that has room for adapters, a last
    argument is each row's.
    """

    def prompt_logprobs(
        leaves: tuple[jax.Array, ...], hidden_TD: jax.Array, rows: jax.Array, targets: jax.Array, *adapters: jax.Array
    ) -> tuple[jax.Array, ...]:
        logits_RV = model.merge(leaves).logits(hidden_TD[rows], *adapters)

        def score(logits_RV: jax.Array, targets_R: jax.Array, tables: Any) -> tuple[jax.Array, ...]:
            return sampling.logprobs(logits_RV, targets_R, MAX_LOGPROBS, body=model.sampler)

        return sampling.by_rows(score, model.mesh, logits_RV, targets)

    return prompt_logprobs


def pool(hidden_TD: jax.Array, weights_RT: jax.Array) -> jax.Array:
    """Weighted sums of hidden states, float32 [R, D]: pooling of up to R requests' share of a step.

    Args:
        weights_RT: float32; a row picks (or sums) one request's positions.
    """
    return jnp.dot(weights_RT, hidden_TD.astype(jnp.float32), preferred_element_type=jnp.float32)


def used_leaves(fn: Callable[..., Any], leaves: tuple[Any, ...], *rest: Any) -> list[int]:
    """Which of the first argument's leaves `fn` reads: programs are called with those alone (0.4 us an argument)."""
    jaxpr = jax.make_jaxpr(fn)(leaves, *rest).jaxpr
    read = {id(v) for eqn in jaxpr.eqns for v in eqn.invars} | {id(v) for v in jaxpr.outvars}
    return [i for i in range(len(leaves)) if id(jaxpr.invars[i]) in read]
