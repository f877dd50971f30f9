"""From one of transformers' models to a `Trace`: recorded at three lengths, held against each other, cut into functions."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.bridge import cuts, stand_ins, tensors, written_out
from models.bridge.graph import Attends, Call, Function, Held, Length, Node, Program, Ref, Refused, Trace
from models.bridge.record import RawNode, Recording, Value, record

LENGTHS = (19, 23, 4099)
"""Tokens of the recordings. Two say how a number depends on the length; the third, longer than most windows, says that it does. It
is shorter where positions end before, and never all of them: slices of tables would not be seen."""

WRITTEN_OUT = (1031, 2051)
"""The most tokens of the third where a model computes scores of all tokens with all tokens itself: with our mask, which says how
far it sees, and with its own."""


def trace(hf: Mapping[str, Any], dtype: str = "float32") -> Trace:
    """Records what transformers computes for a `config.json`.

    Args:
        hf: that dictionary, with `tie_word_embeddings` as the weights have it.
        dtype: of activations, "float32" or "bfloat16".
    Raises:
        Refused: it cannot be served over pages; the message says why.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    model = stand_ins.make(hf, fake, getattr(torch, dtype))
    names = {id(tensor): name for name, tensor in stand_ins.parameters(model)}
    path, decoder = _decoder(model)
    parameters, facts = tensors.published(model, fake), _facts(model.config)
    layers, hidden, counted = _layers(decoder), *_hidden(decoder)
    lengths = (*LENGTHS[:2], min(LENGTHS[2], facts["max_positions"] - 1))

    def recorded(length: int) -> Recording:
        return record(hidden, _tokens(length, fake), names, fake, layers, stand_ins.torch_attention, counted)

    with stand_ins.installed(model):
        first = [recorded(length) for length in lengths]
        if written_out.written_out(first[-1]):
            most = WRITTEN_OUT[0 if written_out.masked_by_us(first[-1]) else 1]
            lengths = (*LENGTHS[:2], min(most, facts["max_positions"] - 1))
            first[-1] = recorded(lengths[-1])
        first = written_out.replaced(first)
        width = first[0].shapes[first[0].output][-1]
        stub = _Stub()
        model.set_submodule(path, stub)

        def logits(states: torch.Tensor) -> torch.Tensor:
            stub.states = states
            return model(
                input_ids=torch.zeros(states.shape[:2], dtype=torch.int64), **_taken(model, use_cache=False)
            ).logits

        second = [
            record(
                logits, _states(length, width, fake, getattr(torch, dtype)), names, fake, (), stand_ins.torch_attention
            )
            for length in lengths
        ]
    maker = _Maker(parameters, facts["vocab_size"], lengths)
    program, head = maker.program(first, len(layers)), maker.program(second, 0)
    facts |= {"embed_dim": width, **maker.found()}
    parameters = cuts.planned(parameters, maker.functions, program.calls)
    return Trace(facts, tuple(maker.functions), program, head, parameters)


def _hidden(decoder: Any) -> tuple[Any, bool]:
    """(hidden states of tokens and positions, whether the network counts positions itself)."""
    counted = "position_ids" not in inspect.signature(decoder.forward).parameters
    first = next((part.padding_idx + 1 for part in decoder.modules() if hasattr(part, _PADDED)), 0)

    def hidden(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        told = {} if counted else {"position_ids": positions + first if first else positions}
        out = decoder(input_ids=tokens, **told, **_taken(decoder, use_cache=False))
        return out[0] if isinstance(out, tuple) else out.last_hidden_state

    return hidden, counted


_PADDED = "create_position_ids_from_input_ids"
"""Of what counts positions from behind its padding token's id."""


def _taken(module: Any, **told: Any) -> dict[str, Any]:
    """Those that its forward takes."""
    parameters = inspect.signature(module.forward).parameters
    any_name = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    return {name: value for name, value in told.items() if any_name or name in parameters}


class _Stub(torch.nn.Module):
    """Stands where the network of a model was, and gives what it is told."""

    states: torch.Tensor

    def forward(self, *args: Any, **told: Any) -> Any:
        return _Output(self.states)


class _Output:
    def __init__(self, states: torch.Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]


def _tokens(length: int, fake: FakeTensorMode) -> tuple[torch.Tensor, torch.Tensor]:
    with fake:
        return torch.zeros((1, length), dtype=torch.int64), torch.zeros((1, length), dtype=torch.int64)


def _states(length: int, width: int, fake: FakeTensorMode, dtype: torch.dtype) -> tuple[torch.Tensor]:
    with fake:
        return (torch.zeros((1, length, width), dtype=dtype),)


def _facts(config: Any) -> dict[str, Any]:
    """Numbers of a configuration under the names that most families have."""
    text = config.get_text_config()
    try:
        heads = getattr(text, "num_attention_heads", None)
    except RuntimeError as e:  # transformers' answer where layers differ in it
        raise Refused("its layers have different numbers of heads") from e
    if heads is None:
        raise Refused("it has no heads of attention")
    heads = max(heads) if isinstance(heads, list | tuple) else heads
    return {
        "vocab_size": int(text.vocab_size),
        "num_layers": int(text.num_hidden_layers),
        "num_heads": int(heads),
        "max_positions": int(getattr(text, "max_position_embeddings", None) or 2048),
        "tied": bool(getattr(text, "tie_word_embeddings", False)),
    }


def _decoder(model: Any) -> tuple[str, Any]:
    """The network below a model's head, and its path."""
    found: Any = model.get_decoder() if hasattr(model, "get_decoder") else None
    for candidate in (found, model.base_model):
        path = next((name for name, module in model.named_modules() if module is candidate), "")
        if path and "input_ids" in inspect.signature(candidate.forward).parameters:
            return path, candidate
    raise Refused("it has no network apart from its head")


def _layers(decoder: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """(name, module) of the layers: the longest list of modules that is not inside of another one."""
    lists = [(name, one) for name, one in decoder.named_modules() if isinstance(one, torch.nn.ModuleList)]
    outer = [(name, one) for name, one in lists if not any(name.startswith(f"{other}.") for other, _ in lists)]
    name, found = max(outer, key=lambda one: len(one[1]), default=("", ()))
    return [(f"{name}.{index}", layer) for index, layer in enumerate(found)]


class _Maker:
    """Functions as they are found, equal ones once."""

    def __init__(self, parameters: Mapping[str, Any], vocab: int, lengths: Sequence[int]) -> None:
        self.functions: list[Function] = []
        self._parameters, self._vocab, self._lengths = parameters, vocab, lengths
        self._tables: set[str] = set()  # weights that rows are taken from
        self._place: dict[str, int] = {}
        self._attends: list[Attends] = []
        self._mixtures: list[tuple[int, int, int] | None] = []  # of each layer: experts, those of a token, their width

    def found(self) -> dict[str, Any]:
        """Numbers of attention for whoever serves the model.

        Raises:
            Refused: nothing attends.
        """
        if not self._attends:
            raise Refused("its attention does not go through transformers' interface for attention")
        first = self._attends[0]
        kinds = {mixture for mixture in self._mixtures if mixture is not None}
        if len({experts for experts, _, _ in kinds}) > 1:
            raise Refused("its layers have different numbers of experts")
        mixture = max(kinds, default=None)
        layers = tuple(mixture is not None for mixture in self._mixtures)
        facts = {"num_kv_heads": first.kv_heads, "head_dim": first.head_dim}
        return facts | {"moe": None if mixture is None else (*mixture, layers)}

    def program(self, recordings: Sequence[Recording], layers: int) -> Program:
        """The calls of what was recorded at several lengths."""
        first = recordings[0]
        nodes = _needed(_agreed(recordings, self._lengths), first.output)
        kept = {node.outs[0] for node in nodes}
        looked_up = {value for node in nodes if node.op == "aten.embedding" for value in _values(node.args[0])}
        self._tables |= {first.weights[value] for value in looked_up if value in first.weights}
        bounds = _bounds(first, layers)
        pieces: list[tuple[str, list[Node]]] = []
        for prefix, begin, end in bounds:
            piece = [node for node in nodes if begin <= _place_of(first, node) < end and node.outs[0] in kept]
            if piece:
                pieces.append((prefix, piece))
        later: list[set[int]] = [set() for _ in pieces]
        wanted = {first.output}
        for index in range(len(pieces) - 1, -1, -1):
            later[index] = set(wanted)
            wanted |= {value for node in pieces[index][1] for value in _refs(node)}
        calls = tuple(
            self._call(prefix, piece, first, wanted_later)
            for (prefix, piece), wanted_later in zip(pieces, later, strict=True)
        )
        return Program(calls, first.inputs, first.output)

    def _call(self, prefix: str, nodes: list[Node], recording: Recording, later: set[int]) -> Call:
        made = [out for node in nodes for out in node.outs]
        used = list(dict.fromkeys(value for node in nodes for value in _refs(node)))
        outside = [value for value in used if value not in set(made)]
        weights = [value for value in outside if value in recording.weights]
        constants = [value for value in outside if value in recording.constants]
        inputs = [value for value in outside if value not in recording.weights and value not in recording.constants]
        number = {value: index for index, value in enumerate([*inputs, *weights, *constants, *made])}
        outputs = [value for value in made if value in later]
        attends: list[Attends] = []
        renamed = tuple(_numbered(node, number, attends, recording) for node in nodes)
        self._attends += attends
        mixture = self._mixture(nodes, recording)
        if prefix or mixture is not None:
            self._mixtures.append(mixture)
        tables = {number[value] for value in weights if recording.weights[value] in self._tables}
        held = tuple(self._held(recording.weights[value], number[value], prefix, renamed, tables) for value in weights)
        function = Function(
            len(inputs), held, tuple(recording.constants[value] for value in constants), renamed,
            tuple(number[value] for value in outputs), tuple(attends),
        )  # fmt: skip
        if function.digest not in self._place:
            self._place[function.digest] = len(self.functions)
            self.functions.append(function)
        return Call(
            self._place[function.digest], tuple(inputs), tuple(outputs), tuple(recording.weights[v] for v in weights)
        )

    def _mixture(self, nodes: Sequence[Node], recording: Recording) -> tuple[int, int, int] | None:
        for node in nodes:
            if node.op == "jaxserve.experts":
                ids, gate_up = (recording.shapes[node.args[place].value] for place in (1, 3))
                return gate_up[0], ids[-1], gate_up[1] // 2
        return None

    def _held(self, name: str, number: int, prefix: str, nodes: Sequence[Node], tables: set[int]) -> Held:
        """How a function uses a weight. `tables`: those that are looked up, too; their products have no biases of their own."""
        shape, uses = self._parameters[name].shape, set()
        for node in nodes:
            uses |= {(node.op, place) for place, one in enumerate(node.args) if one == Ref(number)}
            if node.op == "jaxserve.linear" and node.args[2] == Ref(number) and _values(node.args[1]) & tables:
                uses.add((node.op, -1))
            if any(number in _values(one) for one in node.args if isinstance(one, tuple)):
                uses.add((node.op, -1))
        kinds = {
            "linear": {("jaxserve.linear", 1)},
            "bias": {("jaxserve.linear", 2)},
            "table": {("aten.embedding", 0), ("jaxserve.linear", 1)},
            "experts": {("jaxserve.experts", 3)},
            "experts_down": {("jaxserve.experts", 4)},
        }
        kind = next(
            (kind for kind, of in kinds.items() if uses <= of and (kind != "table" or shape[0] == self._vocab)), "plain"
        )
        relative = name.split(f"{prefix}.", 1)[1] if prefix and f"{prefix}." in name else name
        return Held(kind, relative, shape, _is_router(name))


def _is_router(name: str) -> bool:
    return any(part in ("gate", "router", "shared_expert_gate", "wg") for part in name.split(".")[-3:-1])


def _place_of(recording: Recording, node: Node) -> int:
    """Where a node was recorded."""
    places = recording.__dict__.setdefault("_places", {one.outs[0]: at for at, one in enumerate(recording.nodes)})
    return places[node.outs[0]]


def _bounds(recording: Recording, layers: int) -> list[tuple[str, int, int]]:
    """(prefix, first, behind the last node) of each layer and of what is between them; one piece where layers are not called
    one after the other."""
    end, marks = len(recording.nodes), sorted(recording.marks, key=lambda mark: mark[1])
    in_turn = all(a[2] <= b[1] for a, b in itertools.pairwise(marks))
    if not layers or not in_turn or len(marks) != layers:
        return [("", 0, end)]
    bounds, at = [], 0
    for name, begin, behind in marks:
        bounds += [("", at, begin), (name, begin, behind)]
        at = behind
    return [*bounds, ("", at, end)]


def _numbered(node: Node, number: Mapping[int, int], attends: list[Attends], recording: Recording) -> Node:
    """A node with a function's own numbers; an attention has its place among the function's, in place of what it is told."""

    def own(argument: Any) -> Any:
        if isinstance(argument, tuple):
            return tuple(own(part) for part in argument)
        return Ref(number[argument.value]) if isinstance(argument, Ref) else argument

    args = tuple(own(argument) for argument in node.args)
    if node.op == "jaxserve.attend":
        shapes = [recording.shapes[argument.value] for argument in node.args[:3]]
        attends.append(Attends(shapes[1][1], shapes[1][3], shapes[2][3], **json.loads(node.args[4])))
        args = (*args[:4], len(attends) - 1, *args[5:])
    return Node(node.op, args, own(node.kwargs), tuple(number[out] for out in node.outs))


def _values(argument: Any) -> set[int]:
    if isinstance(argument, tuple):
        return {value for part in argument for value in _values(part)}
    return {argument.value} if isinstance(argument, Ref) else set()


def _refs(node: Node) -> list[int]:
    """The values that a node needs, in order."""
    out: list[int] = []

    def walk(argument: Any) -> None:
        if isinstance(argument, tuple):
            for part in argument:
                walk(part)
        elif isinstance(argument, Ref):
            out.append(argument.value)

    walk(node.args)
    walk(node.kwargs)
    return out


def _needed(nodes: Sequence[Node], output: int) -> list[Node]:
    """Those that the result needs."""
    wanted, kept = {output}, []
    for node in reversed(nodes):
        if wanted & set(node.outs):
            kept.append(node)
            wanted |= set(_refs(node))
    return kept[::-1]


def _agreed(recordings: Sequence[Recording], lengths: Sequence[int]) -> list[Node]:
    """One list of nodes for all lengths.

    Raises:
        Refused: something else was computed at another length.
    """
    different = Refused("it computes something else for more tokens")
    first = recordings[0]
    for other in recordings[1:]:
        if [n.op for n in other.nodes] != [n.op for n in first.nodes] or other.weights != first.weights:
            raise different
        same = other.constants.keys() == first.constants.keys() and all(
            other.constants[v].shape == a.shape and (other.constants[v] == a).all() for v, a in first.constants.items()
        )
        if not same or other.output != first.output:
            raise different
    return [_agreed_node(nodes, lengths, different) for nodes in zip(*(r.nodes for r in recordings), strict=True)]


def _agreed_node(nodes: tuple[RawNode, ...], lengths: Sequence[int], different: Refused) -> Node:
    def agree(parts: tuple[Any, ...]) -> Any:
        one = parts[0]
        if any(type(part) is not type(one) for part in parts):
            raise different
        if isinstance(one, Value):
            if len({part.number for part in parts}) > 1:
                raise different
            return Ref(one.number)
        if isinstance(one, tuple):
            if len({len(part) for part in parts}) > 1:
                raise different
            return tuple(agree(group) for group in zip(*parts, strict=True))
        if isinstance(one, int) and not isinstance(one, bool):
            return _number(parts, lengths, different)
        if any(part != one and not (part != part and one != one) for part in parts):
            raise different
        return one

    if len({node.outs for node in nodes}) > 1:
        raise different
    return Node(
        nodes[0].op,
        agree(tuple(node.args for node in nodes)),
        agree(tuple(node.kwargs for node in nodes)),
        nodes[0].outs,
    )


def _number(parts: tuple[int, ...], lengths: Sequence[int], different: Refused) -> int | Length:
    slope, rest = divmod(parts[1] - parts[0], lengths[1] - lengths[0])
    offset = parts[0] - slope * lengths[0]
    if rest or any(slope * length + offset != part for length, part in zip(lengths, parts, strict=True)):
        raise different
    return Length(slope, offset) if slope else offset
