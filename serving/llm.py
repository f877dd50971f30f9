"""The notebook and offline face: a model in this process, behind blocking calls.

llm = LLM()
for out in llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32)):
    print(out.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import difflib
import inspect
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from serving.engine.api.adapters import LoRARequest
from serving.engine.api.config import EngineConfig
from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.types import EngineInfo, EngineStats
from serving.service import (
    ChatOptions,
    GenerateInput,
    PreparedRequest,
    RequestOutput,
    ScoreInput,
    TextService,
    Usage,
    prepare_chat,
)
from serving.service.replies.outputs import (
    ClassificationOutput,
    ClassificationRequestOutput,
    EmbeddingOutput,
    EmbeddingRequestOutput,
)
from serving.text.tools.reply import Message

if TYPE_CHECKING:
    from serving.boot.startup import Started
    from serving.text.tokenizer import Tokenizer

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]
Lora = LoRARequest | Sequence[LoRARequest | None] | None


def config_signature() -> inspect.Signature:
    """What `LLM` takes, as editors and `help` show it: the fields of `EngineConfig`, with their types and defaults."""
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter("self", positional)]
    for field in dataclasses.fields(EngineConfig):  # the model comes first
        kind = positional if field.name == "model" else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=field.default, annotation=field.type))
    return inspect.Signature(parameters)


class LLM:
    """A model loaded, compiled and running in this process.

    Requests of one call run together (continuous batching), and calls from several threads do too. Ctrl-C during a
    call ends its requests, not the model. Works where an event loop already runs, as in notebooks.

    Args:
        model: GGUF file, Hugging Face or Orbax directory, hub id, or None for SmolLM2-135M-Instruct.
        settings: the fields of `EngineConfig`, by name: `max_model_len`, `tokenizer`, `kv_cache_memory="512MiB"`, ...;
            `help(EngineConfig)` and `python -m serving.launch --help` say what each does.
    Raises:
        ValueError: what cannot be served, in a sentence.
    """

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        from serving.boot import lora_modules, startup

        _check_settings(settings)
        config = EngineConfig(model=model, **settings)
        say = (lambda line: print(line, file=sys.stderr)) if config.progress else (lambda line: None)
        self._init(startup.start(config, say=say))
        lora_modules.add_default_loras(self._service.adapters, config)

    __init__.__signature__ = config_signature()  # type: ignore[attr-defined]

    @classmethod
    def from_started(cls, started: Started) -> LLM:
        """An LLM over an engine that runs already; shutting it down shuts that down."""
        self = cls.__new__(cls)
        self._init(started)
        return self

    def _init(self, started: Started) -> None:
        self._started = started
        self._loop = _LoopThread()
        changes = {"max_media_bytes": None}  # a call's chats come all at once
        self._service: TextService = self._loop.run(_on_loop(started.service, limit_changes=changes))
        self._finalizer = weakref.finalize(self, _shutdown, started, self._loop)

    # -- requests ----------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        lora_request: Lora = None,
    ) -> list[RequestOutput]:
        """Completes prompts.

        Args:
            prompts: a text, a mapping with "prompt" or "prompt_token_ids", or a list of those or of lists of token ids.
            sampling_params: one for all, or one each; None takes the model's defaults with 16 tokens.
            use_tqdm: show a progress bar.
            priority: one each; lower runs first (scheduling policy "priority").
            lora_request: the adapter to run with, one for all or a list with None for the base model.
        Returns:
            one result a prompt, in their order.
        Raises:
            RequestError: a prompt or parameter that cannot be served (nothing has run then), or a failure on the way.
        """
        inputs = [_input_of(prompt) for prompt in _listed(prompts)]
        if priority is not None:
            _same_length("priority", priority, inputs)
            inputs = [dataclasses.replace(given, priority=p) for given, p in zip(inputs, priority, strict=True)]
        return self._run_all(self._adapted(inputs, lora_request), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        parallel_tool_calls: bool = True,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        lora_request: Lora = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, or each of a list of them.

        Args:
            messages: OpenAI's messages, or a list of such lists.
            tools: functions in OpenAI's shape that the model may call.
            tool_choice: "none", "auto", "required" or {"type": "function", "function": {"name": ...}}. A call that is
                required or named has arguments that satisfy the tool's schema.
            parallel_tool_calls: False allows one call an answer.
            add_generation_prompt, continue_final_message, chat_template_kwargs: for the chat template.
            lora_request: as `generate`.
        Returns:
            one result a conversation, in their order; `.outputs[0].message` has the calls and the thinking.
        Raises:
            RequestError: as `generate`.
        """
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        inputs = [
            GenerateInput(
                messages=conversation,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs or {},
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                whole=True,
            )
            for conversation in conversations
        ]
        inputs = self._adapted(inputs, lora_request)
        return self._run_all(
            inputs, sampling_params, use_tqdm, ChatOptions(tool_choice, parallel_tool_calls=parallel_tool_calls)
        )

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None = None,
        use_tqdm: bool = True,
        lora_request: Lora = None,
    ) -> list[EmbeddingRequestOutput]:
        """Turns prompts into vectors of length 1.

        Args:
            prompts: as `generate`.
            pooling: "last" or "mean" over the final hidden states; None is the model's own.
            lora_request: as `generate`.
        Returns:
            one result a prompt, in their order; the vector is `.outputs.embedding`.
        Raises:
            RequestError: a prompt that cannot be served, or a model that gives no embeddings.
        """

        async def one(given: GenerateInput) -> EmbeddingRequestOutput:
            found = await self._service.embed(given, pooling=pooling)
            return EmbeddingRequestOutput(
                found.request_id, EmbeddingOutput(found.vector.tolist()), list(found.prompt_token_ids)
            )

        return self._read_each(prompts, one, use_tqdm, "Embeddings", lora_request)

    def classify(
        self, prompts: Prompt | Sequence[Prompt], *, use_tqdm: bool = True
    ) -> list[ClassificationRequestOutput]:
        """What prompts are, by the labels of a sequence classifier (`info.labels`).

        Args:
            prompts: as `generate`.
        Returns:
            one result a prompt, in their order; one number a label is `.outputs.probs`.
        Raises:
            RequestError: a prompt that cannot be served, or a model that is no classifier.
        """

        async def one(given: GenerateInput) -> ClassificationRequestOutput:
            found = await self._service.classify(given)
            return ClassificationRequestOutput(
                found.request_id, ClassificationOutput(list(found.values)), list(found.prompt_token_ids)
            )

        return self._read_each(prompts, one, use_tqdm, "Classifications")

    def score(
        self,
        first: str | Sequence[str],
        second: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        lora_request: LoRARequest | None = None,
    ) -> list[float]:
        """How relevant the second texts are to the first: a cross-encoder's own scores, else cosines of embeddings.

        Args:
            first: one text for all of `second`, or one each.
            second: one or more texts.
            truncate_prompt_tokens: keep so many tokens of a pair (of a text, where the model reads texts one by one).
            lora_request: the adapter to embed texts with.
        Returns:
            one score a pair, in their order.
        Raises:
            RequestError: texts that cannot be served, or a model that gives neither scores nor embeddings.
        """
        self._check_alive()
        seconds = [second] if isinstance(second, str) else list(second)
        firsts = [first] * len(seconds) if isinstance(first, str) else list(first)
        _same_length("first", firsts, seconds)
        (model,) = self._service.adapters.asked_for(lora_request, 1)
        given = ScoreInput(list(zip(firsts, seconds, strict=True)), truncate_prompt_tokens, model)
        return list(self._loop.run(self._service.score(given)).values)

    # -- facts -------------------------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._started.text.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults, with max_tokens 16."""
        return self._service.make_params({"max_tokens": 16})

    @property
    def info(self) -> EngineInfo:
        """Facts fixed at start: sizes, dtypes, devices."""
        return self._service.info

    def stats(self) -> EngineStats:
        """A recent snapshot of the engine's counters."""
        return self._service.client.stats()

    @property
    def service(self) -> TextService:
        """The text service, living on a private event loop. For front ends of their own; not for plain calls."""
        return self._service

    def shutdown(self) -> None:
        """Ends the engine and gives its memory back. Further calls fail."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def _adapted(self, inputs: list[GenerateInput], lora: Lora) -> list[GenerateInput]:
        """The inputs, each for its adapter, which is loaded where its name or its path is new."""
        names = self._service.adapters.asked_for(lora, len(inputs))
        return [
            given if n is None else dataclasses.replace(given, model=n) for given, n in zip(inputs, names, strict=True)
        ]

    # -- inside ------------------------------------------------------------------------------------------------------

    def _run_all(
        self,
        inputs: list[GenerateInput],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        options: ChatOptions | None = None,
    ) -> list[RequestOutput]:
        self._check_alive()
        params = self._params_for(inputs, sampling_params)
        with _bar(len(inputs), use_tqdm, "Completions") as bar:
            return self._loop.run(self._all(inputs, params, bar, options))

    def _read_each(
        self,
        prompts: Prompt | Sequence[Prompt],
        one: Callable[[GenerateInput], Awaitable[Any]],
        use_tqdm: bool,
        what: str,
        lora: Lora = None,
    ) -> list[Any]:
        """What `one` makes of each prompt, in their order."""
        inputs = self._adapted([_input_of(prompt) for prompt in _listed(prompts)], lora)
        self._check_alive()

        async def told(given: GenerateInput, bar: _Bar) -> Any:
            found = await one(given)
            bar.done(Usage(prompt_tokens=len(found.prompt_token_ids)))
            return found

        with _bar(len(inputs), use_tqdm, what) as bar:
            return self._loop.run(self._gather([lambda given=given: told(given, bar) for given in inputs]))

    def _check_alive(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("This LLM has been shut down.")

    def _params_for(
        self, inputs: list[GenerateInput], given: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * len(inputs)
        _same_length("sampling_params", given, inputs)
        return list(given)

    async def _all(
        self,
        inputs: list[GenerateInput],
        params: list[SamplingParams],
        bar: _Bar,
        options: ChatOptions | None,
    ) -> list[RequestOutput]:
        prepared = [await self._prepare(given, p, options) for given, p in zip(inputs, params, strict=True)]
        return await self._gather([lambda one=one: self._one(one, bar, options) for one in prepared])

    async def _prepare(
        self, given: GenerateInput, params: SamplingParams, options: ChatOptions | None
    ) -> PreparedRequest:
        if options is None or not params.detokenize:
            return await self._service.prepare(given, params)
        fields = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
        return await prepare_chat(self._service, given, fields, options)

    async def _gather(self, work: Sequence[Callable[[], Coroutine[Any, Any, T]]]) -> list[T]:
        """Runs all, in order of results; the first failure, or a cancellation, ends the others."""
        # Enough to keep every slot busy while finished ones are replaced; ten thousand at once would only cost memory.
        gate = asyncio.Semaphore(max(64, 4 * self._service.info.max_num_seqs))

        async def gated(make: Callable[[], Coroutine[Any, Any, T]]) -> T:
            async with gate:
                return await make()

        tasks = [asyncio.create_task(gated(make)) for make in work]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: PreparedRequest, bar: _Bar, options: ChatOptions | None) -> RequestOutput:
        result = RequestOutput.of(request)
        messages = [Message() for _ in result.outputs]
        usage = Usage()
        async with contextlib.aclosing(self._service.generate(request)) as outputs:
            async for output in outputs:
                result.add(output)
                usage.add(output)
                messages[output.index].add(output.events or ())
        bar.done(usage)
        if options is not None:
            for choice, message in zip(result.outputs, messages, strict=True):
                plain = {"role": "assistant", "content": choice.text}
                choice.message = plain if request.reader is None else message.as_dict(options.forces_call)
        return result


class _LoopThread:
    """An event loop in a thread of its own: the caller may have one running already."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="jaxserve-llm")
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine there and waits. Interrupted (Ctrl-C), it cancels the work and waits for its end."""
        finished = threading.Event()

        async def watched() -> T:
            try:
                return await work
            finally:
                finished.set()

        future = asyncio.run_coroutine_threadsafe(watched(), self._loop)
        try:
            return future.result()
        except BaseException:
            if not future.done():
                future.cancel()
                finished.wait(10.0)
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        if not self._thread.is_alive():
            self._loop.close()


def _shutdown(started: Started, loop: _LoopThread) -> None:
    started.engine.shutdown()
    loop.close()


async def _on_loop(make: Any, **options: Any) -> TextService:
    return make(**options)


class _Bar:
    """A tqdm bar over requests, with token rates behind it."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._prompt_tokens = self._tokens = 0

    def done(self, usage: Usage) -> None:
        if self._bar is None:
            return
        self._prompt_tokens += usage.prompt_tokens
        self._tokens += usage.completion_tokens
        elapsed = max(self._bar.format_dict["elapsed"], 1e-6)
        self._bar.set_postfix_str(
            f"in {self._prompt_tokens / elapsed:.0f} tok/s, out {self._tokens / elapsed:.0f} tok/s", refresh=False
        )
        self._bar.update(1)


@contextlib.contextmanager
def _bar(total: int, shown: bool, what: str) -> Iterator[_Bar]:
    if not shown:
        yield _Bar(None)
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="prompt", dynamic_ncols=True) as bar:
        yield _Bar(bar)


def _listed(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    """One prompt or many, as many. A list of whole numbers is one prompt of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [prompts]  # type: ignore[list-item]
    return prompts  # type: ignore[return-value]


def _input_of(prompt: Prompt) -> GenerateInput:
    if isinstance(prompt, Mapping):
        ids, text = prompt.get("prompt_token_ids"), prompt.get("prompt")
        return GenerateInput(text=text, whole=True) if ids is None else GenerateInput(token_ids=list(ids), whole=True)
    if isinstance(prompt, str):
        return GenerateInput(text=prompt, whole=True)
    return GenerateInput(token_ids=list(prompt), whole=True)


def _same_length(name: str, given: Sequence[Any], inputs: Sequence[Any]) -> None:
    if len(given) != len(inputs):
        raise ValueError(f"{name} has {len(given)} entries for {len(inputs)} prompts; give one each, or one for all.")


def _check_settings(given: Mapping[str, Any]) -> None:
    known = [f.name for f in dataclasses.fields(EngineConfig)]
    for name in (one for one in given if one not in known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise TypeError(f"LLM has no option {name!r}.{hint}")
