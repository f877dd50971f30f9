"""A trace as a model that the engine runs: torch's operations in JAX, with our attention, products and experts in their places."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.api import KVCache, Result, StateSpec, Step
from models.bridge import parts
from models.bridge.aten import operation
from models.bridge.graph import Attends, Function, Length, Node, Ref, Trace, mapped
from models.bridge.graph import run as run_nodes
from models.config import ModelConfig
from models.layers import Build, Embedding, Linear
from models.layers.moe import Experts
from models.recipes import Recipes
from ops.paged_attention import array_pages, attend, layer_pages
from ops.paged_attention.batch import AttentionBatch, KVSpec


class BridgedDecoder(nnx.Module):
    """`models.api.CausalLM` over a trace.

    `embed` and `head` are what other decoders have under these names; `held` has every other parameter's module, in the order in
    which they are used. `exact_pages`: pages keep positions beside keys, which eight bits do not hold.
    """

    def __init__(self, config: ModelConfig, build: Build, trace: Trace):
        self.config, self.compute_dtype, self.trace = config, build.compute_dtype, trace
        head, made, paths = parts.head_of(trace), [], {}
        own: dict[str, Any] = {"embed": None, "head": None}
        for name, held in parts.uses(trace).items():
            if held.kind in parts.ELSEWHERE:
                continue
            module = parts.make(name, held, trace, config, build, name == head)
            place = "embed" if held.kind == "table" else "head" if name == head else ""
            if place and own[place] is None:
                own[place], paths[name] = module, place
            else:
                paths[name] = f"held.{len(made)}"
                made.append(module)
        self.embed, self.head = own["embed"], own["head"]
        self.held: Any = nnx.List(made)
        self.paths = tuple(paths.items())
        self.exact_pages = any(one.slopes is not None for f in trace.functions for one in f.attends)
        self.specs = tuple(
            KVSpec(one.kv_heads, one.head_dim + (0 if one.slopes is None else 2), one.v_head_dim, one.window)
            for call in trace.hidden.calls
            for one in trace.functions[call.function].attends
        )

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    def kv_specs(self) -> tuple[KVSpec, ...]:
        return self.specs

    def state_specs(self) -> tuple[StateSpec, ...]:
        return ()

    def forward(self, step: Step, cache: KVCache) -> Result:
        assert step.embeddings is None and not step.taps, "traced models have neither media nor taps"
        steps, pages = step.by_group(), list(cache)
        visited: list[jax.Array] = []
        values: dict[int, Any] = dict(
            zip(self.trace.hidden.inputs, (step.tokens_T[None], step.positions_T[None]), strict=True)
        )
        at = 0
        for call in self.trace.hidden.calls:
            function = self.trace.functions[call.function]
            places = [step.attention.place(at + i) for i in range(len(function.attends))]
            own = [layer_pages(pages[a], self.specs[at + i], part) for i, (_, a, part) in enumerate(places)]
            at += len(places)
            graphdef, state = nnx.split(self._modules(function, call.weights))
            given = [values[value] for value in call.inputs]
            batches = tuple(steps[group].attention for group, _, _ in places)
            outs, kept, ids = run_function(
                function,
                graphdef,
                state,
                given,
                batches,
                tuple(own),
                step.adapter_T,
                (str(jnp.dtype(self.compute_dtype)), step.tokens_T.shape[0], False),
            )
            values |= zip(call.outputs, outs, strict=True)
            for (_, array, _), one in zip(places, kept, strict=True):
                pages[array] = array_pages(one)
            visited += ids
        return Result(values[self.trace.hidden.output][0], tuple(pages), (), tuple(visited))

    def logits(self, hidden_RD: jax.Array, adapter_R: jax.Array | None = None) -> jax.Array:
        program, how = self.trace.logits, (str(jnp.dtype(self.compute_dtype)), hidden_RD.shape[0], True)
        values: dict[int, Any] = {program.inputs[0]: hidden_RD[None]}
        for call in program.calls:
            function = self.trace.functions[call.function]
            graphdef, state = nnx.split(self._modules(function, call.weights))
            given = [values[value] for value in call.inputs]
            outs, _, _ = run_function(function, graphdef, state, given, (), (), adapter_R, how)
            values |= zip(call.outputs, outs, strict=True)
        return values[program.output][0].astype(jnp.float32)

    def _modules(self, function: Function, weights: Sequence[str]) -> Any:
        """The modules of a call, in the order of the function's weights; those that another one has are left out."""
        return nnx.List(
            [
                self._module(name)
                for name, held in zip(weights, function.held, strict=True)
                if held.kind not in parts.ELSEWHERE
            ]
        )

    def _module(self, name: str) -> Any:
        path = dict(self.paths)[name]
        return getattr(self, path) if "." not in path else self.held[int(path.partition(".")[2])]

    def recipes(self) -> Recipes:
        """How every parameter is made, by its path."""
        recipes: Recipes = {}
        for name, path in self.paths:
            parameter, module = self.trace.parameters[name], self._module(name)
            if isinstance(module, Experts):
                recipes[f"{path}.gate_up"] = parts.gate_up_recipe(parameter, module.shards)
                recipes[f"{path}.down"] = parts.recipe(self.trace.parameters[parts.down_of(self.trace, name)])
                continue
            recipes[f"{path}.weight"] = parts.recipe(parameter)
            bias = parts.bias_of(self.trace, name) if isinstance(module, Linear) else None
            if bias is not None:
                recipes[f"{path}.bias"] = parts.recipe(self.trace.parameters[bias])
        return recipes


@functools.partial(jax.jit, static_argnums=(0, 1, 7))
def run_function(
    function: Function,
    graphdef: Any,
    state: Any,
    inputs: list[Any],
    batches: tuple[AttentionBatch, ...],
    pages: tuple[Any, ...],
    adapter_T: jax.Array | None,
    how: tuple[str, int, bool],
) -> tuple[list[Any], tuple[Any, ...], tuple[jax.Array, ...]]:
    """One call, as a function of its own: equal layers are traced once.

    Args:
        graphdef, state: its modules.
        batches, pages: of each of its attentions.
        adapter_T: of the tokens, or of rows of hidden states.
        how: the dtype of activations, how many tokens (or rows) there are, and whether products are float32.
    Returns:
        (what it gives, its pages, the experts that tokens visited).
    """
    dtype, length, head = how
    work = _Work(function, nnx.merge(graphdef, state), batches, list(pages), adapter_T, jnp.dtype(dtype), head)
    values = [*inputs, *work.weights(), *map(jnp.asarray, function.constants)]
    outs = run_nodes(function, values, lambda node, table: work.compute(node, table, length))
    return outs, tuple(work.pages), tuple(work.visited)


class _Work:
    """What the nodes of one call have in common."""

    def __init__(
        self, function: Function, modules: Any, batches: Any, pages: list[Any], adapter_T: Any, dtype: Any, head: bool
    ) -> None:
        self._function, self._batches, self.pages = function, batches, pages
        self._adapter_T, self._dtype, self._head = adapter_T, dtype, head
        self.visited: list[jax.Array] = []
        self._modules = list(modules)

    def weights(self) -> list[Any]:
        """One value a weight: its module; of what another module has, the name of its kind."""
        rest = iter(self._modules)
        return [held.kind if held.kind in parts.ELSEWHERE else next(rest) for held in self._function.held]

    def compute(self, node: Node, table: list[Any], length: int) -> tuple[Any, ...]:
        """A node's results."""

        def leaf(argument: Any) -> Any:
            if isinstance(argument, Ref):
                return table[argument.value]
            return argument.slope * length + argument.offset if isinstance(argument, Length) else argument

        args = [mapped(argument, leaf) for argument in node.args]
        own = _OWN.get(node.op)
        if own is not None:
            return (own(self, *args),)
        if node.op == "aten.embedding" and isinstance(args[0], Embedding):
            return (self.rows(*args[:2]),)
        args = [mapped(argument, self._array) for argument in args]
        kwargs = {name: mapped(mapped(argument, leaf), self._array) for name, argument in node.kwargs}
        out = operation(node.op)(*args, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    def _array(self, value: Any) -> Any:
        """A module that is used as an array."""
        if isinstance(value, nnx.Module):
            array = value.weight.get_value()  # pyright: ignore[reportAttributeAccessIssue]
            return array.astype(self._dtype) if isinstance(array, jax.Array) and array.dtype == jnp.float32 else array
        return value

    def rows(self, table: Embedding, ids: jax.Array) -> jax.Array:
        """The token table's rows."""
        flat = ids.reshape(-1)
        own = self._adapter_T if self._adapter_T is not None and self._adapter_T.shape == flat.shape else None
        return table(flat, self._dtype, own).reshape(*ids.shape, -1)

    def linear(self, x: jax.Array, module: Any, bias: Any) -> jax.Array:
        """A product with a weight; the weight's module has the bias where it is the weight's alone."""
        dtype = jnp.float32 if self._head else None
        flat = x.reshape(-1, x.shape[-1])
        own = self._adapter_T
        if own is not None and own.shape[0] != flat.shape[0]:
            if getattr(module, "lora", None) is not None:
                raise ValueError("adapters do not go with this traced model: a product of it is not one row a token.")
            own = None
        if isinstance(module, Linear):
            y = module(flat, out_dtype=dtype, adapter_T=own)
        elif isinstance(module, Embedding):
            y = module.logits(flat, own).astype(x.dtype if dtype is None else dtype)
        else:
            y = flat @ self._array(module).T
        y = y.reshape(*x.shape[:-1], -1)
        return y if bias is None or isinstance(bias, str) else y + self._array(bias)

    def attend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: Any, place: int, positions: jax.Array | None = None
    ) -> jax.Array:
        """Attention over pages: [1, H, T, h] -> [1, T, H, h]."""
        said, T = self._function.attends[place], q.shape[2]
        if said.slopes is not None:
            assert positions is not None
            q, k = _with_positions(q, k, positions[0], said)
        G = q.shape[1] // said.kv_heads
        q_TKGh = jnp.moveaxis(q[0], 1, 0).reshape(T, said.kv_heads, G, q.shape[3])
        k_TKh, v_TKh = (jnp.moveaxis(one[0], 1, 0) for one in (k, v))
        sinks_KG = None if sinks is None else self._array(sinks).astype(jnp.float32).reshape(said.kv_heads, G)
        out_TKGh, self.pages[place] = attend(
            q_TKGh, k_TKh, v_TKh, self.pages[place], self._batches[place], scale=said.scale, window=said.window,
            softcap=said.softcap, sinks_KG=sinks_KG, chunk=said.chunk,
        )  # fmt: skip
        return out_TKGh.reshape(1, T, said.kv_heads * G, -1).astype(v.dtype)

    def experts(self, x: jax.Array, ids: jax.Array, weights: jax.Array, module: Experts, *_: Any) -> jax.Array:
        """A mixture's experts."""
        k = ids.shape[-1]
        ids_Tk = ids.reshape(-1, k).astype(jnp.int32)
        self.visited.append(ids_Tk)
        return module(x.reshape(-1, x.shape[-1]), ids_Tk, weights.reshape(-1, k), self._adapter_T).reshape(x.shape)


def _with_positions(q: jax.Array, k: jax.Array, positions_T: jax.Array, said: Attends) -> tuple[jax.Array, jax.Array]:
    """Queries and keys with two numbers more, whose product is what a head adds for a key's position. Of the position one number
    counts 256s and one what is left: bfloat16 has both exactly."""
    assert said.slopes is not None
    slopes_H = np.broadcast_to(np.asarray(said.slopes, np.float32) / said.scale, (q.shape[1],))
    more_H2 = jnp.asarray(np.stack([256 * slopes_H, slopes_H], -1), q.dtype)
    more_T2 = jnp.stack([positions_T // 256, positions_T % 256], -1).astype(k.dtype)
    q = jnp.concatenate([q, jnp.broadcast_to(more_H2[None, :, None], (*q.shape[:3], 2))], -1)
    return q, jnp.concatenate([k, jnp.broadcast_to(more_T2[None, None], (*k.shape[:3], 2))], -1)


_OWN: dict[str, Any] = {
    "jaxserve.linear": _Work.linear,
    "jaxserve.attend": _Work.attend,
    "jaxserve.experts": _Work.experts,
}
