"""What the server, `LLM` and the batch runner share: an engine and the text service over it, from one configuration."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from serving import memory
from serving.boot.lora_modules import default_loras
from serving.boot.sampling import SamplingDefaults, sampling_defaults
from serving.boot.text_side import InThread, TextSide, load_text_side
from serving.engine.api import phases
from serving.engine.api.config import EngineConfig

if TYPE_CHECKING:
    from models.loading.source import ModelSource
    from serving.boot.check import Checked
    from serving.boot.start import AnyEngine
    from serving.metrics.tracing import Tracing
    from serving.processes.leader import Leader
    from serving.service import Limits, TextService
    from serving.text.grammar import GrammarCompiler

T = TypeVar("T")
Progress = Callable[[str], None]

__all__ = ["Described", "Started", "TextSide", "describe", "load_text_side", "start"]


@dataclasses.dataclass(frozen=True)
class Started:
    """A running engine and what a TextService over it needs. `service` may be called once per event loop."""

    engine: AnyEngine
    text: TextSide
    default_params: dict[str, Any]
    grammars: GrammarCompiler | None = None
    leader: Leader | None = None
    reads: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def watch(self, watch: Callable[[AnyEngine], None]) -> None:
        """Has the engine watched."""
        watch(self.engine)

    def shutdown(self) -> None:
        """Ends what still runs, and the engine's other processes."""
        self.engine.shutdown()
        if self.leader is not None:
            self.leader.stop()

    def service(
        self,
        *,
        served_names: Sequence[str] = (),
        limits: Limits | None = None,
        executor: Any = None,
        tracing: Tracing | None = None,
        limit_changes: Mapping[str, Any] = {},
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> TextService:
        """A text service for the calling event loop.

        Args:
            served_names: names for the model, the first of which answers carry; the model's own name without.
            limits: None takes the defaults for the engine's context, with `limit_changes`.
            tracing: where spans of what is served go.
            tool_parser, reasoning_parser: as for `TextService`.
        """
        from serving.metrics import MeteredClient
        from serving.service import Limits, TextService

        info = self.engine.client.info()
        names = list(served_names) or [info.model_id]
        metered = MeteredClient(self.engine.client, names[0], tracing)
        metered.metrics.set_startup(phases.recorded())
        return TextService(
            metered,
            self.text.tokenizer,
            self.text.chat_template,
            model_id=names[0],
            aliases=names[1:],
            limits=limits or Limits.for_model(info.max_model_len, **limit_changes),
            default_params=self.default_params,
            grammar_compiler=self.grammars,
            executor=executor,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
            **self.reads,
        )


@dataclasses.dataclass(frozen=True)
class Described:
    """A model of which all is known that headers, tokenizer and settings say, and found good; no weight is read.

    Attributes:
        leader: of the engine's other processes, which have been met.
    """

    checked: Checked
    text: TextSide
    leader: Leader | None = None

    @property
    def writes(self) -> bool:
        """Whether it completes text. What transcribes does not."""
        tasks = self.checked.opened.family.tasks
        return "generate" in tasks and "transcribe" not in tasks

    def reads(self, engine: Any = None) -> dict[str, Any]:
        """What a `TextService` over it is given for images and sound, by name.

        Args:
            engine: that runs it, where it is in this process.
        Raises:
            ValueError: settings about them that cannot be followed.
        """
        if self.checked.tower is None:
            return {}
        from serving.boot.senses.reading import media_reader, speech_of

        opened, shape = self.checked.opened, self.checked.tower.shape
        if shape.lasting:
            return {"speech": speech_of(opened, self.text.tokenizer, engine)}
        return {"media": media_reader(self.checked.config, opened.hf_config, shape.most_patches)}

    def default_params(self, say: Progress) -> dict[str, Any]:
        """What applies to requests that name no sampling parameters."""
        opened, config = self.checked.opened, self.checked.config
        if not self.writes:
            return {}
        defaults = SamplingDefaults()
        if config.generation_config == "auto":
            called = (opened.model_id, opened.hf_config.get("model_type") or "", opened.source.path.stem)
            defaults = sampling_defaults(opened.generation_config, called, self.text.chat_template is not None)
        say(f"sampling, where a request names nothing: {defaults}")
        return dict(defaults.values)

    def grammars(self, idle: Callable[[], bool] = lambda: True) -> GrammarCompiler | None:
        """What compiles grammars for it; None where it writes no text.

        Args:
            idle: whether nobody waits for the process just now.
        """
        if not self.writes or not self.text.tokenizer.reads_text:
            return None
        from serving.text.grammar import GrammarCompiler

        grammars = GrammarCompiler(self.text.tokenizer, self.checked.built.config.vocab_size)
        InThread(lambda: warm_when_idle(grammars, idle))
        return grammars

    def begin(self, say: Progress) -> AnyEngine:
        """Loads the model and starts its engine. Once: the next engine of the same model is described anew.

        Raises:
            ValueError: as `start`.
        """
        from serving.boot.start import start_checked

        try:
            return start_checked(self.checked, say, self.leader)
        except BaseException as error:
            if self.leader is not None:
                self.leader.stop(f"process 0 could not start: {error}")
            raise


def warm_when_idle(grammars: GrammarCompiler, idle: Callable[[], bool], pause_s: float = 1.0) -> None:
    """Indexes the vocabulary, so that the first constrained request does not wait for it: as long as that takes (a second for
    150,000 tokens) no other Python runs, so neither the start nor a stream shall wait for it.

    Args:
        pause_s: how long nothing is done at first, and between two looks at whether the process is idle.
    """
    while not grammars.is_warm:
        time.sleep(pause_s)
        if idle():
            grammars.warm()


def describe(
    config: EngineConfig,
    *,
    say: Progress = lambda line: None,
    on_loss: Callable[[str], None] | None = None,
    at_once: bool = False,
) -> Described:
    """Checks all that can be checked before a weight is read; the other arguments are those of `start`.

    Args:
        at_once: the model is loaded right afterwards.
    Raises:
        ValueError: what cannot be served, in a sentence.
    """
    from models.loading.source import resolve
    from serving.boot.platform import prepare_platform, programs_folder, read_ahead

    default_loras(config)
    source = resolve(config.model, progress=config.progress)
    named = config.tokenizer
    text_source = source if named is None else resolve(named, progress=config.progress)
    # The tokenizer takes about a second of pure Python and Rust, most of which fits into the time in which JAX is imported
    # and the headers are read.
    text = InThread(lambda: _timed("text", lambda: load_text_side(text_source, config.chat_template)))
    programs = programs_folder(config, say)
    prepare_platform(config, programs)
    if at_once:
        read_ahead(config, source, say)
    leader = None if config.coordinator is None else _lead(config, source, on_loss, say)
    try:
        from serving.boot.check import check
        from serving.boot.draft import check_vocabulary

        checked = check(config, source, programs)
        side: TextSide = text.result()
        check_vocabulary(checked.draft, checked.opened, checked.built.config.vocab_size, side.tokenizer)
        if not side.tokenizer.reads_text:
            say(f"{checked.opened.model_id} has no tokenizer: it serves token ids. Another's is taken with --tokenizer")
    except BaseException as error:
        if leader is not None:
            leader.stop(f"process 0 could not start: {error}")
        raise
    return Described(checked, side, leader)


def start(
    config: EngineConfig, *, say: Progress = lambda line: None, on_loss: Callable[[str], None] | None = None
) -> Started:
    """Starts an engine and loads the text side beside it. Blocks until both are ready.

    Args:
        say: told each step as one line.
        on_loss: told when another process of the engine is lost, which may be at any time and on any thread.
    Raises:
        ValueError: what cannot be served, in a sentence; all that flags, headers, tokenizer and template can say against it
            is said before a weight is read.
    """
    began = time.monotonic()
    described = describe(config, say=say, on_loss=on_loss, at_once=True)
    phases.record("check", time.monotonic() - began)
    engine = described.begin(say)
    defaults = described.default_params(say)
    memory.give_back()
    phases.record("total", time.monotonic() - began)
    reads = described.reads(engine)

    def idle() -> bool:
        stats = engine.client.stats()
        return stats.num_running + stats.num_waiting == 0

    return Started(engine, described.text, defaults, described.grammars(idle), described.leader, reads)


def _timed(phase: str, function: Callable[[], T]) -> T:
    began = time.monotonic()
    result = function()
    phases.record(phase, time.monotonic() - began)
    return result


def _lead(
    config: EngineConfig, source: ModelSource, on_loss: Callable[[str], None] | None, say: Progress
) -> Leader | None:
    """Makes this process the first of several; None when it is alone."""
    from serving.processes.start import lead, place_of

    processes = place_of(config)
    if processes is None:
        return None
    if on_loss is None or processes.index != 0:
        raise ValueError("several processes need the server: run python -m serving.launch in each of them.")
    return lead(config, processes, source.path, on_loss, say)
