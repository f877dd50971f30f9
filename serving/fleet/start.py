"""The start of a server with several models: all are checked before the first is loaded; those that are wanted at once are
loaded, and the rest when somebody asks."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from serving import memory
from serving.boot.flags import ModelEntry
from serving.boot.startup import Described, describe
from serving.engine.api import phases
from serving.engine.api.client import Where
from serving.engine.api.types import EngineStats
from serving.fleet.member import Member
from serving.fleet.turns import Turns
from serving.reliability.watchdog import StalledError

if TYPE_CHECKING:
    from serving.boot.start import AnyEngine
    from serving.fleet.fleet import Fleet
    from serving.metrics.tracing import Tracing

log = logging.getLogger(__name__)

Progress = Callable[[str], None]
CPU_SHARE = 0.6
"""Of the memory that is free at the start, what loaded models may take together on a CPU."""
LEAST_KV = 1 << 26


@dataclasses.dataclass(frozen=True)
class FleetOptions:
    """What the server's flags say of all models together.

    Attributes:
        memory: bytes for loaded models; None: by what is free.
        wait_s, turn_s: as for `Keeper`.
    """

    memory: int | None = None
    wait_s: float = 120.0
    turn_s: float = 10.0


class FleetEngine:
    """What the server asks of an engine, of all of them: whether one of them has stalled, which only a new process mends. Where
    one dies otherwise, the next request makes a new one."""

    leader = None

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = members
        self._failure: BaseException | None = None
        self._told: set[int] = set()

    @property
    def failure(self) -> BaseException | None:
        for member in self._members:
            engine = member.engine
            error = None if engine is None else engine.failure
            if isinstance(error, StalledError):
                self._failure = error
            elif error is not None and id(error) not in self._told:
                self._told.add(id(error))
                log.error("the engine of %s died; the next request for it starts another", member.name, exc_info=error)
        return self._failure

    def declare_dead(self, error: BaseException) -> None:
        """Ends the server."""
        self._failure = error

    @property
    def client(self) -> FleetEngine:
        """Itself, for its `stats`."""
        return self

    def stats(self) -> EngineStats:
        """For a crash report: the first one's."""
        return self._members[0].stats

    @property
    def recent(self) -> tuple[Any, ...]:
        """The last steps of all engines, for a crash report."""
        return tuple(step for one in self._members if one.engine is not None for step in one.engine.recent)


class StartedFleet:
    """Members, some of them loaded: what `Started` is of one model."""

    leader = None

    def __init__(
        self,
        members: Sequence[Member],
        described: Sequence[Described],
        memory: int,
        options: FleetOptions,
        say: Progress,
    ) -> None:
        self.members = tuple(members)
        self.memory = memory
        self.engine = FleetEngine(members)
        self._options = options
        self._say = say
        self._texts = [
            (one.text, one.default_params(lambda line: None), one.grammars(), one.reads()) for one in described
        ]

    def watch(self, watch: Callable[[AnyEngine], None]) -> None:
        """Has each engine watched, those to come as well. On the server's event loop."""
        import asyncio

        loop = asyncio.get_running_loop()
        for member in self.members:
            member.on_loaded = lambda engine: loop.call_soon_threadsafe(watch, engine) and None
            if member.engine is not None:
                watch(member.engine)

    def shutdown(self) -> None:
        """Ends every engine."""
        ends = [threading.Thread(target=one.engine.shutdown) for one in self.members if one.engine is not None]
        for thread in ends:
            thread.start()
        for thread in ends:
            thread.join()

    def service(
        self,
        *,
        served_names: Sequence[str] = (),
        tracing: Tracing | None = None,
        limit_changes: Mapping[str, Any] = {},
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> Fleet:
        """The services of all of them, for the calling event loop.

        Args:
            served_names: nothing: each has its own.
            tracing, limit_changes: as for `Started.service`.
            tool_parser, reasoning_parser: of those that do not say their own.
        """
        from serving.access.rates import RateMeter
        from serving.fleet.client import MemberClient
        from serving.fleet.fleet import Fleet
        from serving.fleet.keeper import Keeper
        from serving.fleet.metrics import FleetMetrics
        from serving.metrics import MeteredClient
        from serving.service import Limits, TextService

        options = self._options
        keeper = Keeper(self.members, self.memory, wait_s=options.wait_s, turn_s=options.turn_s, say=self._say)
        rates = RateMeter(limit_changes.get("requests_per_minute"))
        services = []
        for member, (text, params, grammars, reads) in zip(self.members, self._texts, strict=True):
            entry = member.entry
            metered = MeteredClient(MemberClient(member, keeper), member.name, tracing)
            metered.metrics.set_startup(phases.recorded() if not services else {})
            services.append(
                TextService(
                    metered, text.tokenizer, text.chat_template, model_id=member.name, aliases=entry.aliases,
                    limits=Limits.for_model(member.info.max_model_len, **limit_changes), default_params=params,
                    grammar_compiler=grammars, tool_parser=entry.tool_call_parser or tool_parser,
                    reasoning_parser=entry.reasoning_parser or reasoning_parser, rates=rates, is_default=not services, **reads,
                )
            )  # fmt: skip
        services[0].client.metrics.add(FleetMetrics(keeper))
        keeper.start()
        tenants = {one.name: one.entry.tenants for one in self.members if one.entry.tenants is not None}
        fleet = Fleet(services, tenants, keeper)
        for member, service in zip(self.members, services, strict=True):
            if member.entry.lora_modules:
                fleet.declare(service, member.entry.lora_modules)
        return fleet


def start_fleet(entries: Sequence[ModelEntry], options: FleetOptions, *, say: Progress) -> StartedFleet:
    """Checks every model, and loads the first one, the pinned ones and those that ask for it, as far as there is room.

    Raises:
        ValueError: one that cannot be served, or pinned ones that do not fit together, in a sentence.
    """
    began = time.monotonic()
    turns = Turns()
    members: list[Member] = []
    described: list[Described] = []
    limit = 0
    for entry in entries:
        config = entry.config
        try:
            if not limit:
                limit = options.memory or _memory(config)
            if config.kv_cache_memory is None:
                config = dataclasses.replace(config, kv_cache_memory=_kv_share(limit, len(entries)))
            entry = dataclasses.replace(entry, config=config)
            one = describe(config, say=lambda line, name=entry.name: say(f"{name}: {line}"))
            member = _member(entry, one, turns)
        except ValueError as error:
            raise ValueError(f"models: {entry.name}: {error}") from None
        described.append(one)
        members.append(member)
    phases.record("check", time.monotonic() - began)
    started = StartedFleet(members, described, limit, options, say)
    wanted = [one for i, one in enumerate(members) if i == 0 or one.entry.pinned or one.entry.load]
    for member in sorted(wanted, key=lambda one: not one.entry.pinned):
        _load_at_start(member, members, limit, say)
    memory.give_back()
    phases.record("total", time.monotonic() - began)
    return started


def _member(entry: ModelEntry, described: Described, turns: Turns) -> Member:
    from serving.boot.compile import cache_bytes_before, info_before
    from serving.boot.load import weight_bytes

    checked = described.checked
    return Member(entry, described, info_before(checked), weight_bytes(checked) + cache_bytes_before(checked), turns)


def _load_at_start(member: Member, members: Sequence[Member], limit: int, say: Progress) -> None:
    """Loads a member unless there is no room beside those that were loaded before."""
    taken = sum(one.bytes for one in members)
    free = limit - taken
    if member.need > free:
        from serving.engine.device.sizing import in_words

        sentence = (
            f"needs {in_words(member.need)}, and {in_words(max(free, 0))} of {in_words(limit)} for models are free"
        )
        if member.entry.pinned or not taken:
            raise ValueError(
                f"models: {member.name} {sentence}. Raise models_memory, lower its kv_cache_memory, or pin fewer."
            )
        say(f"{member.name} {sentence}: it is loaded when somebody asks for it")
        return
    member.load(say)
    member.where = Where.LOADED
    member.since = member.used = time.monotonic()


def _memory(config: Any) -> int:
    """What models may take where nobody says."""
    from serving.boot.platform import prepare_platform, programs_folder

    prepare_platform(config, programs_folder(config, lambda line: None))
    import jax

    if jax.default_backend() == "cpu":
        return int(CPU_SHARE * memory.free_memory()[0])
    from serving.engine.device.sizing import ACCELERATOR_FRACTION, GIB

    share = config.gpu_memory_utilization or ACCELERATOR_FRACTION
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return int(sum(one.get("bytes_limit", 8 * GIB) * share for one in stats) - GIB * len(stats))


def _kv_share(limit: int, models: int) -> int:
    """Bytes of a model's KV cache where nobody says: a power of two, so that it is the same at the next start."""
    wanted = min(1 << 31, limit // 4, limit // (2 * models))
    return max(LEAST_KV, 1 << (max(wanted, 1).bit_length() - 1))
