"""What the server, `LLM` and the batch runner share: an engine and the text service over it, from one configuration."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from serving import memory
from serving.engine.api import phases
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.errors import RequestError

if TYPE_CHECKING:
    from models.loading.source import ModelSource
    from serving.boot.start import AnyEngine
    from serving.metrics.tracing import Tracing
    from serving.processes.leader import Leader
    from serving.service import Limits, TextService
    from serving.text.chat_template import ChatTemplate
    from serving.text.grammar import GrammarCompiler
    from serving.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
T = TypeVar("T")
Progress = Callable[[str], None]

SAMPLING_DEFAULTS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""What of a checkpoint's generation_config applies to requests that leave it open, as in vLLM."""


@dataclasses.dataclass(frozen=True)
class TextSide:
    """The parts of a model that deal with text."""

    tokenizer: Tokenizer
    chat_template: ChatTemplate | None


@dataclasses.dataclass(frozen=True)
class Started:
    """A running engine and what a TextService over it needs. `service` may be called once per event loop."""

    engine: AnyEngine
    text: TextSide
    default_params: dict[str, Any]
    grammars: GrammarCompiler | None = None
    group: Leader | None = None

    def shutdown(self) -> None:
        """Ends what still runs, and the engine's other processes."""
        self.engine.shutdown()
        if self.group is not None:
            self.group.stop()

    def service(
        self,
        *,
        served_names: Sequence[str] = (),
        limits: Limits | None = None,
        executor: Any = None,
        tracing: Tracing | None = None,
        requests_per_minute: int | None = None,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
    ) -> TextService:
        """A text service for the calling event loop.

        Args:
            served_names: names for the model, the first of which answers carry; the model's own name without.
            limits: None takes the defaults for the engine's context, with `requests_per_minute` of one key.
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
            limits=limits or Limits.for_model(info.max_model_len, requests_per_minute=requests_per_minute),
            default_params=self.default_params,
            grammar_compiler=self.grammars,
            executor=executor,
            tool_parser=tool_parser,
            reasoning_parser=reasoning_parser,
        )


def start(
    config: EngineConfig,
    *,
    tokenizer: str | None = None,
    use_generation_config: bool = True,
    say: Progress = lambda line: None,
    on_loss: Callable[[str], None] | None = None,
) -> Started:
    """Starts an engine and loads the text side beside it. Blocks until both are ready.

    Args:
        tokenizer: GGUF file, Hugging Face directory or hub id to take the tokenizer from instead of the model's own.
        use_generation_config: let the checkpoint's sampling defaults apply to requests that leave them open.
        say: told each step as one line.
        on_loss: told when another process of the engine is lost, which may be at any time and on any thread.
    Raises:
        ValueError: what cannot be served, in a sentence.
    """
    began = time.monotonic()
    from models.loading.source import resolve

    source = resolve(config.model, progress=config.progress)
    group = None
    if config.coordinator is not None:
        group = _lead(config, source, on_loss, say)
    text_source = resolve(tokenizer, progress=config.progress) if tokenizer is not None else source
    # The tokenizer takes about a second of pure Python and Rust, most of which fits into the time that the engine
    # spends in XLA.
    text = _InThread(lambda: _timed("text", lambda: load_text_side(text_source, config.chat_template)))
    from serving.boot.start import start_engine
    from serving.text.grammar import GrammarCompiler

    try:
        engine = start_engine(config, say, group)
    except BaseException as error:
        if group is not None:
            group.stop(f"process 0 could not start: {error}")
        raise
    try:
        side = text.result()
        defaults = sampling_defaults(engine.generation_config) if use_generation_config else {}
    except BaseException:
        engine.shutdown()
        raise
    memory.give_back()
    phases.record("total", time.monotonic() - began)
    info = engine.client.info()
    if "generate" not in info.tasks:
        return Started(engine, side, defaults)
    grammars = GrammarCompiler(side.tokenizer, info.vocab_size)
    _InThread(grammars.warm)  # so that the first constrained request does not wait for it
    return Started(engine, side, defaults, grammars, group)


def _timed(phase: str, function: Callable[[], T]) -> T:
    began = time.monotonic()
    result = function()
    phases.record(phase, time.monotonic() - began)
    return result


def _lead(
    config: EngineConfig, source: ModelSource, on_loss: Callable[[str], None] | None, say: Progress
) -> Leader | None:
    """Makes this process the first of several; None when it is alone."""
    from serving.boot.assembly import prepare_platform
    from serving.processes.start import lead, place_of

    processes = place_of(config)
    if processes is None:
        return None
    if on_loss is None or processes.index != 0:
        raise ValueError("several processes need the server: run python -m serving.launch in each of them.")
    prepare_platform(config)
    return lead(config, processes, source.path, on_loss, say)


def load_text_side(source: ModelSource, chat_template: str | None = None) -> TextSide:
    """Reads a model's tokenizer and chat template; no weights.

    Args:
        chat_template: a file, or Jinja text, instead of the model's own.
    Raises:
        ValueError: the tokenizer or the template cannot be used.
    """
    from serving.text.chat_template import ChatTemplate
    from serving.text.tokenizer import Tokenizer

    if source.kind == "gguf":
        from models.loading.gguf import GGUFFile

        tokenizer = Tokenizer.from_gguf(GGUFFile(source.path).metadata)
    else:
        tokenizer = Tokenizer.from_directory(source.path)
    template = read_template(chat_template) if chat_template is not None else None
    return TextSide(tokenizer, ChatTemplate.from_tokenizer(tokenizer, template))


def read_template(given: str) -> str:
    """The Jinja text that `--chat-template` names or is.

    Raises:
        ValueError: it is neither a file nor looks like a template.
    """
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ValueError(f"--chat-template {given}: cannot be read as a file ({reason}).") from None


def sampling_defaults(generation_config: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's sampling defaults, without those that SamplingParams refuses."""
    found = {}
    for name in SAMPLING_DEFAULTS:
        value = generation_config.get(name)
        if value is None:
            continue
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            log.warning("the checkpoint's generation_config is ignored in part: %s", error.message)
        else:
            found[name] = value
    return found


class _InThread:
    """A function's result, computed in a daemon thread: an interrupted start-up does not wait for it."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function,), daemon=True, name="jaxserve-text-side")
        self._thread.start()

    def _run(self, function: Callable[[], Any]) -> None:
        try:
            self._value = function()
        except BaseException as error:
            self._error = error

    def result(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value
