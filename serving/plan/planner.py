"""From a configuration, a target and a mesh to a plan: what fits, what it costs a step, what it can serve."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

from models.adapters.attach import AUTO
from models.parameters import experts, parameters_of, tables
from ops.linear.weights.group_pack import Packing
from ops.paged_attention import least_page_size
from ops.paged_attention.groups import layers_per_page
from serving.engine.cache.kv_windows import pages_of
from serving.engine.device.programs.keys import ProgramKey
from serving.engine.device.programs.placement import num_replicas
from serving.engine.device.sizing import ACCELERATOR_FRACTION, batch_sizes, draft_places
from serving.engine.requests.buckets import Bucket
from serving.engine.requests.sizes import Sizes
from serving.plan.chips import Target
from serving.plan.measure import Measured, extrapolate, measure
from serving.plan.memory import Room, adapter_bytes, tower_bytes
from serving.plan.packed import packing_of
from serving.plan.programs import (
    AbstractEngine,
    abstract_model,
    bytes_on_device,
    config_of,
    layer_periods,
    weight_leaves,
    with_layers,
)
from serving.plan.topology import devices
from sharding.mesh import make_mesh

INT8_SHARES = {"int8": 1.0, "int4": 0.75}
"""Of a CPU's int8 rate that schemes reach: a scale for every 32 inputs costs what it costs (docs/benchmarks/notes_matmul.md)."""
PROBE_PAGES = 64
"""Pages that programs are compiled with: the pool is an argument, so nothing else of a program depends on its size."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked.

    Attributes:
        hf: the model's Hugging Face configuration.
        target: where to.
        mesh: as the server's --mesh.
        dtype, quantization, kv_dtype: as the server's flags; kv_dtype "auto" follows dtype. A Packing is the checkpoint's own form,
            which GPUs and TPUs keep.
        max_num_seqs, max_num_batched_tokens, page_size, max_model_len: as the server's flags.
        context: tokens that a running request has behind it, on average.
        prompt: tokens of the prompt whose time to first token is estimated.
        every_bucket: compile every program of the server, not only those that the numbers need.
        full_depth: compile all layers instead of extrapolating from a few.
        decode_only: compile the decode step alone; then there is no time to first token.
        draft_tokens: drafts that a step verifies for a request at most; 0 for none.
        draft_hf: the configuration of a draft model, whose weights and pages lie beside the model's.
        adapter_slots, max_lora_rank, lora_dtype: room for adapters, as the server's flags; none where 0.
        embeddings_gib: room for what towers make, as the server's --mm-encoder-cache-gb; None serves text alone.
    """

    hf: dict[str, Any]
    target: Target
    mesh: str
    dtype: str = "bfloat16"
    quantization: str | Packing | None = None
    kv_dtype: str = "auto"
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 4096
    page_size: int = 16
    max_model_len: int = 8192
    context: int = 1024
    prompt: int = 1024
    every_bucket: bool = False
    full_depth: bool = False
    decode_only: bool = False
    draft_tokens: int = 0
    draft_hf: dict[str, Any] | None = None
    adapter_slots: int = 0
    max_lora_rank: int = 16
    lora_dtype: str = AUTO
    embeddings_gib: float | None = None

    @property
    def scheme(self) -> str | None:
        """What the server would say of `quantization`."""
        return "stored" if isinstance(self.quantization, Packing) else self.quantization


@dataclasses.dataclass(frozen=True)
class Step:
    """Roofline times of one program on one device, seconds. None of them can be beaten; all are missed by something.

    Attributes:
        name: the program's.
        matmul: the compiler's flops at the chip's rate.
        memory: weights and context that must be read, at the chip's bandwidth.
        links: bytes that collectives send, at the links' bandwidth.
        measured: what the compiler says; None where nothing was compiled.
        context_bytes, weight_bytes: what `memory` is made of.
    """

    name: str
    matmul: float
    memory: float
    links: float
    context_bytes: float
    weight_bytes: float
    measured: Measured | None

    @property
    def seconds(self) -> float:
        """Products and reads overlap; collectives stand between layers."""
        return max(self.matmul, self.memory) + self.links


@dataclasses.dataclass(frozen=True)
class Verified:
    """A step that verifies drafts.

    Attributes:
        requests, places: its decode rows, and the tokens of each: its newest one and its drafts.
        seconds: of it, without what guesses.
        tokens_needed: that a row must give on average for the step to be worth as much as one without drafts.
    """

    requests: int
    places: int
    seconds: float
    tokens_needed: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a server would be. Bytes are of one device."""

    request: Request
    num_parameters: int
    num_layers: int
    weights: int
    adapters: int
    tower: int  # its weights, and room for what it makes
    kv_page: int
    state: int
    snapshots: int  # copies of recurrent layers' states, kept for prefixes
    temporaries: int
    code: int
    usable: int
    replicas: int
    num_pages: int  # of each replica
    windows: tuple[int | None, ...]  # of each attention group
    max_concurrent: int
    draft_weights: int
    verified: tuple[Verified, ...]
    steps: tuple[Step, ...]
    decode_seconds: float | None
    ttft_seconds: float | None
    compile_seconds: float
    extrapolated_from: tuple[int, int] | None

    @property
    def pool(self) -> int:
        """Bytes of the page pool on one device."""
        return max(self.num_pages, 0) * self.kv_page

    @property
    def fits(self) -> bool:
        """Whether at least one request of max_model_len can run."""
        return self.pages_of(self.request.max_model_len) < self.num_pages

    @property
    def tokens(self) -> int:
        """Positions that the pools of all replicas hold, of requests with `context` tokens each; without pages, those of the
        requests that run."""
        size, context = self.request.page_size, self.request.context
        if not self.windows:
            return self.max_concurrent * context
        held = -(-context // size) * size
        return self.replicas * max(self.num_pages - 1, 0) * held // self.pages_of(context)

    def pages_of(self, tokens: int) -> int:
        """Pages that a request of so many tokens holds while it decodes."""
        return pages_of(tokens, self.windows, self.request.page_size)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the whole mesh, at `max_concurrent` requests."""
        return self.max_concurrent / self.decode_seconds if self.fits and self.decode_seconds else None


def make_plan(request: Request, on_done: Callable[[str, int, int], None] | None = None) -> Plan:
    """Compiles what the request calls for and does the arithmetic.

    Args:
        on_done: called with (program, how many are done, of how many).
    Raises:
        ValueError: a model, topology, mesh or size that does not work, in a sentence.
    """
    config = config_of(request.hf)
    if request.max_model_len > config.max_positions:
        request = dataclasses.replace(request, max_model_len=config.max_positions)
    kv_dtype = request.dtype if request.kv_dtype == "auto" else request.kv_dtype
    page_size = max(request.page_size, least_page_size(kv_dtype, request.target.platform))
    request = dataclasses.replace(request, kv_dtype=kv_dtype, page_size=page_size)
    mesh = make_mesh(request.mesh, devices(request.target))
    replicas = num_replicas(mesh)
    cpu = request.target.platform == "cpu"
    seqs, budget = batch_sizes(request.max_num_seqs, request.max_num_batched_tokens, replicas, cpu)
    sizes = _sizes(request, seqs, budget, cpu)

    def runner(num_layers: int) -> AbstractEngine:
        model = abstract_model(
            with_layers(config, num_layers), mesh, request.dtype, request.quantization, request.max_model_len
        )
        # As in sizing.py: a draft model's layers have their part in pages of all layers.
        alone = request.draft_hf is None
        together = layers_per_page(model.kv_specs(), request.max_model_len) if alone else None
        return AbstractEngine(model, dataclasses.replace(sizes, layers_per_page=together), mesh)

    whole, draft = runner(config.num_layers), _draft(request, mesh, sizes)
    start, period = layer_periods(config)
    depths = (start + period, start + 2 * period)
    if request.full_depth or config.num_layers <= depths[1]:
        depths = None
    keys = _keys(whole, request)
    measured, seconds = _measure(whole, keys, runner, depths, config.num_layers, on_done)

    temporaries = max(m.temporaries + m.outputs - m.aliased for m in measured.values())
    code = sum(m.code for m in measured.values())
    usable = int(request.target.chip.memory * ACCELERATOR_FRACTION)
    weights, state = whole.weight_bytes_on_device, whole.state_bytes
    draft_weights = 0 if draft is None else draft.weight_bytes_on_device
    adapters = adapter_bytes(whole, request.adapter_slots, request.max_lora_rank, request.lora_dtype)
    tower = tower_bytes(request.hf, mesh, request.dtype, request.quantization, request.embeddings_gib)
    room = Room.of(whole, draft)
    free = usable - weights - draft_weights - adapters - tower - state - int(temporaries) - int(code)
    num_pages, snapshots = room.within(free + room.states, request.max_model_len, budget)
    concurrent_requests = room.at_once(num_pages, request.context)

    step_of = {key: _step(key, measured[key], whole, request) for key in keys}
    decode = whole.shapes.buckets.find(max(concurrent_requests, 1), 0, 0)
    if ProgramKey("forward", decode) not in step_of:
        decode = whole.shapes.buckets.find(seqs, 0, 0)
    forward, sample = step_of[ProgramKey("forward", decode)], step_of[ProgramKey("sample", decode.samples)]
    return Plan(
        request=request,
        num_parameters=sum(math.prod(parameter.stored_shape) for _, parameter in parameters_of(whole.model)),
        num_layers=config.num_layers,
        weights=weights,
        adapters=adapters,
        tower=tower,
        kv_page=room.page,
        state=state,
        snapshots=snapshots * room.state,
        temporaries=int(temporaries),
        code=int(code),
        usable=usable,
        replicas=replicas,
        num_pages=num_pages,
        windows=room.windows,
        max_concurrent=concurrent_requests * replicas,
        draft_weights=draft_weights,
        verified=tuple(_verified(whole, step_of)),
        steps=tuple(step_of.values()),
        decode_seconds=forward.seconds + sample.seconds,
        ttft_seconds=None if request.decode_only else _ttft(request, whole, step_of),
        compile_seconds=seconds,
        extrapolated_from=depths,
    )


def _sizes(request: Request, seqs: int, budget: int, cpu: bool) -> Sizes:
    """An engine's, but for the size of its pool."""
    if request.draft_tokens >= budget:
        raise ValueError(f"{request.draft_tokens} drafts are more than a step of {budget} tokens verifies.")
    return Sizes(
        seqs, budget, request.max_model_len, PROBE_PAGES, request.page_size, 0, request.kv_dtype,
        draft_tokens=request.draft_tokens, draft_places=draft_places(budget, cpu) if request.draft_tokens else 0,
    )  # fmt: skip


def _prompt_bucket(runner: AbstractEngine, request: Request) -> Bucket:
    chunk = min(request.prompt, runner.shapes.buckets.max_chunk)
    return runner.shapes.buckets.find(0, -(-chunk // 16) * 16, 1)


def _keys(runner: AbstractEngine, request: Request) -> list[ProgramKey]:
    """Programs to compile, those of steps first."""
    if request.every_bucket:
        return sorted(runner.programs(), key=lambda key: (key.kind != "forward", str(key)))
    buckets = runner.shapes.buckets
    seqs = runner.sizes.max_num_seqs
    full = buckets.find(seqs, 0, 0)
    if request.decode_only:
        return [ProgramKey("forward", full), ProgramKey("sample", full.samples)]
    mixed = buckets.find(seqs, buckets.max_chunk, buckets.max_rows)
    prompt = _prompt_bucket(runner, request)
    needed = (full, prompt, mixed, *_verifying(runner))
    forwards = dict.fromkeys(ProgramKey("forward", b) for b in needed)
    samples = dict.fromkeys(ProgramKey("sample", b.samples) for b in needed)
    return [*forwards, *samples]


def _verifying(runner: AbstractEngine) -> tuple[Bucket, ...]:
    """Steps that verify as many drafts as there may be: of one request, and of as many as may have so many; and the same steps
    without drafts."""
    most = runner.sizes.draft_tokens + 1
    rows = [b.decode for b in runner.shapes.buckets.buckets if b.queries == most > 1]
    return tuple(Bucket(count, 0, 0, places) for count in sorted({*rows[:1], *rows[-1:]}) for places in (1, most))


def _verified(runner: AbstractEngine, steps: dict[ProgramKey, Step]) -> Iterator[Verified]:
    def seconds(bucket: Bucket) -> float:
        return steps[ProgramKey("forward", bucket)].seconds + steps[ProgramKey("sample", bucket.samples)].seconds

    for bucket in _verifying(runner):
        if bucket.queries > 1 and ProgramKey("forward", bucket) in steps:
            plain = Bucket(bucket.decode, 0, 0)
            yield Verified(bucket.decode, bucket.queries, seconds(bucket), seconds(bucket) / seconds(plain))


def _draft(request: Request, mesh: Any, sizes: Sizes) -> AbstractEngine | None:
    """A draft model, as shapes: its pages are the model's, in arrays of its own."""
    if request.draft_hf is None:
        return None
    own = packing_of(request.draft_hf) if isinstance(request.quantization, Packing) else request.quantization
    model = abstract_model(config_of(request.draft_hf), mesh, request.dtype, own, request.max_model_len)
    return AbstractEngine(model, dataclasses.replace(sizes, draft_tokens=0, draft_places=0), mesh)


def _measure(
    whole: AbstractEngine,
    keys: list[ProgramKey],
    runner: Callable[[int], AbstractEngine],
    depths: tuple[int, int] | None,
    num_layers: int,
    on_done: Callable[[str, int, int], None] | None,
) -> tuple[dict[ProgramKey, Measured], float]:
    """Each program measured, forward programs extrapolated; and the seconds that it took, added up over threads."""
    jobs: dict[tuple[ProgramKey, int], Any] = {}
    programs = whole.programs()
    few = {depth: runner(depth).programs() for depth in depths or ()}
    for key in keys:
        if depths and key.kind == "forward":
            for depth in depths:
                jobs[key, depth] = few[depth][key]
        else:
            jobs[key, num_layers] = programs[key]
    done: dict[tuple[ProgramKey, int], Measured] = {}
    with concurrent.futures.ThreadPoolExecutor(max(2, min(8, os.cpu_count() or 2))) as pool:
        futures = {pool.submit(measure, program): job for job, program in jobs.items()}
        for future in concurrent.futures.as_completed(futures):
            done[futures[future]] = future.result()
            if on_done:
                on_done(str(futures[future][0]), len(done), len(jobs))
    measured = {}
    for key in keys:
        if depths and key.kind == "forward":
            measured[key] = extrapolate(done[key, depths[0]], done[key, depths[1]], depths, num_layers)
        else:
            measured[key] = done[key, num_layers]
    return measured, sum(m.seconds for m in measured.values())


def _step(key: ProgramKey, measured: Measured, runner: AbstractEngine, request: Request) -> Step:
    """Roofline times of one program; attention's part is arithmetic, because kernels hide it from the compiler."""
    chip = request.target.chip
    weights = context_bytes = attention = products = 0.0
    on_cpu = request.target.platform == "cpu"
    rate = chip.int8_ops * INT8_SHARES.get(request.scheme or "", 0.0) if on_cpu else 0.0
    rate = rate or chip.flops
    if key.kind == "forward":
        bucket = key.shape
        weights = _weights_read(runner, bucket.tokens, head=False)
        # States are read and written anew.
        context_bytes = bucket.decode * (_context_read(runner, request.context, 1) + 2 * runner.bytes_a_state)
        if bucket.chunk:
            context_bytes += 2 * runner.bytes_a_state
            keys = bucket.chunk + (request.context if bucket.decode else 0)
            context_bytes += _context_read(runner, keys, bucket.chunk)
        pairs = bucket.decode_tokens * request.context + bucket.chunk * (bucket.chunk + 1) / 2
        attention = pairs * _attention_flops(runner)
        products = _product_flops(runner, bucket.tokens, head=False)
    elif key.kind in ("sample", "prompt_logprobs"):
        weights = _weights_read(runner, 1, head=True)
        products = _product_flops(runner, key.shape, head=True)
    flops = measured.flops
    if request.target.platform != "tpu":  # the GPU compiler counts nothing, and CPU kernels hide products from theirs
        flops = max(flops, products / runner.mesh.shape["data"])
    return Step(
        name=str(key),
        matmul=(flops + attention) / rate,
        memory=(weights + context_bytes) / chip.bandwidth,
        links=measured.sent / chip.link,
        context_bytes=context_bytes,
        weight_bytes=weights,
        measured=measured,
    )


def _context_read(runner: AbstractEngine, positions: int, queries: int) -> float:
    """Bytes of K and V that one device reads for the last `queries` of `positions`: with a window, the last ones. A layer that
    has another's pages reads them as well."""
    total, specs, kept = 0.0, runner.model.kv_specs(), runner.kv_bytes_a_token
    for spec, layer_bytes in ((specs[place], kept[place]) for place in runner.read_by_layers):
        total += layer_bytes * (positions if spec.window is None else min(positions, spec.window + queries - 1))
    return total


def _weights_read(runner: AbstractEngine, tokens: int, head: bool) -> float:
    """Bytes of weights that one device reads for a step of `tokens` tokens: of experts, those that are expected to be met."""
    moe = runner.model.config.moe
    met = 1.0 if moe is None else 1.0 - (1.0 - moe.experts_per_token / moe.num_experts) ** tokens
    return sum(bytes_on_device(leaf) * (met if routed else 1.0) for routed, leaf in _used(runner, head))


def _product_flops(runner: AbstractEngine, tokens: int, head: bool) -> float:
    """Operations of `tokens` tokens with the weights of one device: of experts, a token's own."""
    moe = runner.model.config.moe
    share = 1.0 if moe is None else moe.experts_per_token / moe.num_experts
    return (
        2.0
        * tokens
        * sum(
            bytes_on_device(leaf) / leaf.dtype.itemsize * (share if routed else 1.0)
            for routed, leaf in _used(runner, head)
        )
    )


def _used(runner: AbstractEngine, head: bool) -> Iterator[tuple[bool, Any]]:
    """(whether it belongs to experts that tokens are sent to, array) of the layers' weights, or of those of the logits."""
    looked_up = set(tables(runner.model))
    logits = "embed." if runner.model.head is None else "head."
    routed = tuple(f"{path}." for path in experts(runner.model))
    for path, _, leaf in weight_leaves(runner.model):
        if head != path.startswith(logits):
            continue
        if path in looked_up and not head:
            continue  # a few rows
        yield path.startswith(routed), leaf


def _attention_flops(runner: AbstractEngine) -> float:
    """Operations for one query position against one key position, all layers, on one device."""
    total, specs, pages = 0.0, runner.model.kv_specs(), runner.kv_of_layers
    config = runner.model.config
    for spec, kv in ((specs[place], pages[place]) for place in runner.read_by_layers):
        shards = runner.mesh.shape["model"] if kv.sharded else 1
        v = spec.v_head_dim or spec.head_dim
        total += 2.0 * max(config.num_heads, spec.num_kv_heads) / shards * (spec.head_dim + v)
    return total


def _ttft(request: Request, runner: AbstractEngine, steps: dict[ProgramKey, Step]) -> float:
    """Of a prompt that arrives at an idle server: its chunks, then one sample."""
    bucket = _prompt_bucket(runner, request)
    chunks = -(-request.prompt // bucket.chunk)
    return chunks * steps[ProgramKey("forward", bucket)].seconds + steps[ProgramKey("sample", bucket.samples)].seconds
