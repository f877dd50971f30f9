"""The one way in: every entry (gRPC, HTTP, LLM, batch) prepares and generates through a `TextService`."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, cast

from serving.access.keys import caller_of_task
from serving.access.rates import RateMeter, Rates
from serving.engine.api.client import EngineClient
from serving.engine.api.sampling_params import SamplingParams, StructuredOutputs
from serving.engine.api.types import EngineOutput, EngineRequest
from serving.errors import ErrorKind, RequestError, invalid
from serving.service import vectors
from serving.service.adapters import Adapters
from serving.service.embedding import embed_one
from serving.service.images import read_prompt, take_images
from serving.service.live import LiveRequest, LiveRequests
from serving.service.replies.merging import merge
from serving.service.replies.outputs import Classification, Embedding, Scores, TextOutput
from serving.service.replies.stream import TextStream
from serving.service.requests import prepare as prep
from serving.service.requests.chat_style import ChatStyle
from serving.service.requests.inputs import GenerateInput
from serving.service.requests.limits import Limits
from serving.service.requests.prepare import ConstraintFactory, PreparedRequest
from serving.service.requests.reach import check_reach
from serving.service.single import Single
from serving.service.threads import TextThreads
from serving.service.vectors import ScoreInput
from serving.service.voice import Voice

if TYPE_CHECKING:
    from serving.media import MediaReader
    from serving.media.parts import Source
    from serving.text.chat_template import ChatTemplate
    from serving.text.grammar import GrammarCompiler
    from serving.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DEFAULT_MODEL = "default"
"""The name that always means the base model."""

Constrain = Callable[[str, SamplingParams], Awaitable[tuple[SamplingParams, ConstraintFactory | None]]]
"""What a grammar that depends on the rendered prompt makes of the parameters, and the grammar's compiled form."""


class TextService(Single):
    """Text in, text out, over any engine. Belongs to one event loop at a time.

    A front end calls `prepare`, which refuses what cannot be served before anything is streamed, then iterates over
    `generate`. Whatever goes wrong reaches it as a `RequestError`, and concerns that request alone.

    Args:
        client: the engine.
        tokenizer: the served model's.
        chat_template: None for a model without one; then `messages` are refused.
        model_id: the name clients see in answers.
        aliases: further names that mean the base model. "default" and the engine's own model id always do.
        limits: None takes the defaults for the engine's context.
        default_params: values for sampling parameters that a client leaves out (the model's generation_config).
        grammar_compiler: None refuses structured outputs.
        executor: where tokenizing and rendering run; None makes two threads.
        tool_parser, reasoning_parser: how the model writes calls and thinking, by a parser's name; None takes what its
            chat template shows.
        rates: counts requests by key; None counts those of this process, by the limits.
        is_default: whether "default" means this model.
        media: reads images; None refuses them.
        speech: a `serving.service.speech.transcribe.Speech`; None transcribes nothing.
    Raises:
        ValueError: there is no such parser.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None = None,
        *,
        model_id: str,
        aliases: Sequence[str] = (),
        limits: Limits | None = None,
        default_params: Mapping[str, Any] | None = None,
        grammar_compiler: GrammarCompiler | None = None,
        executor: Executor | None = None,
        tool_parser: str | None = None,
        reasoning_parser: str | None = None,
        rates: Rates | None = None,
        is_default: bool = True,
        media: MediaReader | None = None,
        speech: Any = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        style = ChatStyle.of(chat_template, tokenizer, tool_parser, reasoning_parser)
        self.model_id = model_id
        self.info = client.info()
        always = (DEFAULT_MODEL,) if is_default else ()
        self.model_names = tuple(dict.fromkeys((model_id, *aliases, *always, self.info.model_id)))
        self.adapters = Adapters(client, Voice(tokenizer, chat_template, style, grammar_compiler), self.model_names)
        self.limits = limits or Limits.for_model(self.info.max_model_len)
        self._rates = rates or RateMeter(self.limits.requests_per_minute)
        self.default_params = dict(default_params or {})
        self.media, self.speech = media, speech
        self.created = int(time.time())
        self.started = time.monotonic()
        self._threads = TextThreads(executor, self.limits.grammar_timeout_s)
        self._serial = itertools.count()
        self._live = LiveRequests(self.limits)
        self._draining = False
        self.kv_address: tuple[str, int] | None = None  # where others reach this server's gRPC, if it gives them pages
        self.draining_listeners: list[Callable[[bool], None]] = []

    # -- requests ----------------------------------------------------------------------------------------------------

    def make_params(self, given: Mapping[str, Any]) -> SamplingParams:
        """Sampling parameters from those a client named, over the model's defaults, over SamplingParams' own.

        Args:
            given: field name -> value. Leave a field out to take its default; that of `max_tokens` is all that the
                context leaves.
        Raises:
            RequestError: INVALID_ARGUMENT naming the field.
        """
        return SamplingParams(**{"max_tokens": None, **self.default_params, **given})

    async def prepare(
        self,
        given: GenerateInput,
        params: SamplingParams,
        *,
        constrain: Constrain | None = None,
        markers: frozenset[int] = frozenset(),
    ) -> PreparedRequest:
        """Validates a request wholly and tokenizes it, off the event loop. Chats with tools or thinking come through
        `serving.service.chat.prepare_chat`.

        Args:
            constrain: makes the grammar from the rendered prompt (tool calls), instead of `params.structured_outputs`.
            markers: control tokens that stay in the text even where special tokens are left out.
        Raises:
            RequestError: INVALID_ARGUMENT, NOT_FOUND (model), UNAVAILABLE (draining or engine dead), UNIMPLEMENTED,
                RESOURCE_EXHAUSTED (rate, or no room for more requests), PERMISSION_DENIED (priority).
        """
        arrival = time.monotonic()
        self.check_ready()
        await self.adapters.resolve(given.model)
        model = self.resolve_model(given.model, given.tenant)
        self._check_task("generate", "does not complete text")
        given, sources = take_images(given, self.media)
        adapter = self.adapters.wanted(model, given.tenant, {source.what for source in sources})
        voice = self.adapters.voice(adapter)
        tokenizer = voice.tokenizer
        given.check(self.limits)
        prep.check_params(params, self.info.vocab_size, self.limits)
        prep.check_reads_text(params, tokenizer)
        if caller := caller_of_task.get():
            caller.check_requests()
            caller.check_priority(given.priority)
        share = caller and caller.share(given.tenant)
        self._live.check_room(params.n, share)
        await self._rates.ask(caller.name if caller else "", params.n)
        salt = caller.cache_salt(given.cache_salt) if caller else given.cache_salt
        prompt, ids, media = await read_prompt(given, sources, voice, self.limits, self._threads, self.media, salt)
        prompt_ids, params = prep.fit_prompt(ids, params, given, self.info.vocab_size, self.info.max_model_len)
        bad_words = await self._threads.run(prep.bad_word_ids, params.bad_words, tokenizer) if params.bad_words else ()
        constraint = None
        if constrain is not None:
            params, constraint = await constrain(prompt or "", params)
        elif params.structured_outputs is not None:
            constraint = await self._compile(params.structured_outputs, voice)
        if constraint is not None:
            await self._threads.run(check_reach, constraint, params, bad_words, tokenizer, self.info.vocab_size)
        request_id = given.request_id or f"req-{uuid.uuid4().hex[:16]}"
        self._live.check_room(params.n, share)  # again: others may have come while the prompt was read
        each = prep.params_of_each(params)
        children = tuple(
            EngineRequest(
                request_id=f"{request_id}#{next(self._serial)}",
                prompt_token_ids=prompt_ids,
                params=each[i],
                eos_token_ids=tuple(tokenizer.eos_token_ids),
                priority=given.priority,
                constraint=constraint() if constraint is not None else None,
                arrival_time=arrival,
                deadline=None if given.timeout_s is None else arrival + given.timeout_s,
                ttft_deadline=None if given.ttft_timeout_s is None else arrival + given.ttft_timeout_s,
                cache_salt=salt,
                tenant=caller.tenant(given.tenant) if caller else given.tenant,
                bad_words_token_ids=bad_words,
                adapter=adapter and adapter.digest,
                transfer=prep.transfer_of(given, self.info),
                media=media,
                whole=given.whole and not params.stop_strings,  # which are looked for in the text as it comes
            )
            for i in range(params.n)
        )
        owner = caller.name if caller else None
        opens = given.messages is not None and not given.continue_final_message
        continues = not opens and not all(map(tokenizer.is_special, prompt_ids))
        made = PreparedRequest(request_id, model, prompt, prompt_ids, params, children, tokenizer)
        return dataclasses.replace(made, owner=owner, markers=markers, continues=continues, share=share)

    async def generate(self, prepared: PreparedRequest) -> AsyncGenerator[TextOutput, None]:
        """Runs a prepared request; yields deltas of its completions, interleaved, each until its finish reason.

        Closing the iterator or cancelling the task that reads it aborts every completion in the engine.

        Raises:
            RequestError: RESOURCE_EXHAUSTED (queue full), UNAVAILABLE, DEADLINE_EXCEEDED, INTERNAL. The completions
                that still run are aborted first.
        """
        with self._live.enter(prepared) as live:
            if (count_request := getattr(self.client, "count_request", None)) is not None:
                count_request(len(prepared.children))
            streams = [self._one(live, i) for i in range(len(prepared.children))]
            async with contextlib.aclosing(merge(streams)) as merged:
                async for _, output in merged:
                    yield output

    async def abort(self, request_id: str) -> bool:
        """Ends every live request with this id that the caller's key began (all of them, for an admin's key or where
        there are no keys): its completions finish with reason ABORT. False if there is none."""
        found = self._live.named(request_id, caller_of_task.get())
        for live in found:
            live.asked_to_end = True
            await self._end(live)
        return bool(found)

    async def abort_all(self, within_s: float = 1.0) -> None:
        """Ends every live request with UNAVAILABLE: the server stops now. Waits up to `within_s` seconds until all know it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await asyncio.gather(*map(self._end, self._live), return_exceptions=True)
                await self._live.wait_idle(within_s)

    async def _end(self, live: LiveRequest) -> None:
        for child in live.prepared.children:
            await self.client.abort(child.request_id)

    async def tokenize(self, given: GenerateInput) -> tuple[str | None, list[int]]:
        """The prompt as text (rendered, for messages; None for token ids) and the ids `generate` would run.

        Raises:
            RequestError: INVALID_ARGUMENT, NOT_FOUND (model).
        """
        await self.adapters.resolve(given.model)
        voice = self.voice(given.model, given.tenant)
        given, sources = take_images(given, self.media)
        given.check(self.limits)
        with await self.counted():
            return (await read_prompt(given, sources, voice, self.limits, self._threads, self.media))[:2]

    async def embed(
        self, given: GenerateInput, *, pooling: str | None = None, prompt_name: str | None = None
    ) -> Embedding:
        """One prompt's embedding.

        Args:
            pooling: "last", "mean" or (encoders) "cls"; None is the model's own.
            prompt_name: which of the prompts that the model's authors wrote goes in front; None for their default one.
        Raises:
            RequestError: as `prepare` and `generate`; UNIMPLEMENTED when the engine cannot pool.
        """
        await self.adapters.resolve(given.model)
        given, sources = take_images(given, self.media)
        self._check_reads(given, "embed", "does not give embeddings")
        with await self.counted():
            return await self._embed(vectors.prompted(given, self.info, prompt_name), pooling, sources)

    async def _embed(
        self, given: GenerateInput, pooling: str | None = None, sources: Sequence[Source] = ()
    ) -> Embedding:
        adapter = self.adapters.find(given.model or "")
        own = {} if adapter is None else {"adapter": adapter.digest}
        request_id = f"{given.request_id or 'embed'}#{next(self._serial)}"
        how = self.adapters.voice(adapter), self.limits, self._threads, self.media
        return await embed_one(self.client, given, sources, request_id, *how, pooling=pooling, **own)

    async def classify(self, given: GenerateInput, *, raw: bool = False) -> Classification:
        """What one text is, by the labels of `info.labels`.

        Args:
            raw: the logits, instead of probabilities.
        Raises:
            RequestError: as `embed`; UNIMPLEMENTED when the model is no sequence classifier.
        """
        self._check_reads(given, "classify", "tells no labels of texts: it is no sequence classifier")
        with await self.counted():
            _, ids = await self._threads.run(vectors.encode, given, self.voice(), self.limits, self.info)
            request_id = f"{given.request_id or 'classify'}#{next(self._serial)}"
            assert self.client.classifier is not None
            found = await self.client.classifier.classify(request_id, ids, raw=raw, priority=given.priority)
        return Classification(request_id, ids, tuple(map(float, found)))

    async def score(self, given: ScoreInput) -> Scores:
        """How relevant the second text of each pair is to the first: by the model itself where it reads pairs, else by
        the cosine of the two texts' embeddings, each text embedded once.

        Raises:
            RequestError: as `embed`; UNIMPLEMENTED when the model neither scores nor embeds.
        """
        await self.adapters.resolve(given.model)
        reads_pairs = self._can("score")
        self._check_reads(given, "score" if reads_pairs else "embed", "does not give scores or embeddings")
        with await self.counted():
            if not reads_pairs:
                return await vectors.score_by_cosine(
                    lambda one: self._embed(vectors.prompted(one, self.info, None)), given
                )
            pairs = await self._threads.run(vectors.encode_pairs, given, self.tokenizer, self.info)
            request_id = f"{given.request_id or 'score'}#{next(self._serial)}"
            assert self.client.scorer is not None
            found = await self.client.scorer.score(request_id, pairs, priority=given.priority)
        return Scores(tuple(map(float, found)), sum(len(pair.token_ids) for pair in pairs))

    async def detokenize(
        self, ids: Sequence[int], *, skip_special_tokens: bool = False, model: str | None = None
    ) -> str:
        """The text of token ids.

        Raises:
            RequestError: INVALID_ARGUMENT (an id outside the vocabulary, too many ids), NOT_FOUND (model).
        """
        tokenizer = self.voice(model).tokenizer
        self.limits.check_count("token ids", len(ids), self.limits.max_prompt_chars, "token_ids")
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.info.vocab_size:
                raise invalid(
                    f"Token {i} is {token!r}; this model's ids go from 0 to {self.info.vocab_size - 1}.", "token_ids"
                )
        with await self.counted():
            return await self._threads.run(lambda: tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    async def offsets(self, ids: Sequence[int], text: str, model: str | None = None) -> list[int]:
        """Where the text of each of a prompt's tokens begins in `text`, the prompt's, in characters: never decreasing, none beyond
        its end. Several tokens of one character begin together; a token that `text` does not show begins where the next does."""
        return await self._threads.run(prep.offsets, ids, text, self.voice(model).tokenizer)

    async def rehearse(self) -> None:
        """Takes a prompt and a completion through the text side once, so that the first client does not wait for threads to
        start and for a tokenizer's and a template's first use (4 ms). Reaches no engine and leaves no trace."""
        given = [GenerateInput(text="Hello")] * 2
        if self.chat_template is not None:
            given[0] = GenerateInput(messages=[{"role": "user", "content": "Hello"}])
        with contextlib.suppress(RequestError):  # a template may refuse anything
            asked = (self.limits, self._threads, None)
            await asyncio.gather(*(read_prompt(one, (), self.voice(), *asked) for one in given))
        stream = TextStream(0, SamplingParams(), (), self.tokenizer)
        stream.push(EngineOutput("", (0,)))

    # -- the server's state ------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        """Requests that are being generated."""
        return len(self._live)

    @property
    def draining(self) -> bool:
        return self._draining

    def start_draining(self) -> None:
        """From now on `prepare` refuses with UNAVAILABLE; what runs goes on."""
        self._set_draining(True)

    def stop_draining(self) -> None:
        """Takes requests again."""
        self._set_draining(False)

    def _set_draining(self, draining: bool) -> None:
        self._draining = draining
        for tell in self.draining_listeners:
            tell(draining)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Waits until no request is live; False when some still are after `timeout_s` seconds."""
        return await self._live.wait_idle(timeout_s)

    def check_ready(self) -> None:
        """Raises UNAVAILABLE while draining or when the engine is dead."""
        if self._draining:
            raise RequestError(
                ErrorKind.UNAVAILABLE, "The server is shutting down; ask another replica.", retry_after_s=5.0
            )
        if not self.client.healthy:
            raise RequestError(ErrorKind.UNAVAILABLE, "The engine has stopped; the server is about to restart.")
        if self.client.refusal is not None:
            raise RequestError(ErrorKind.UNAVAILABLE, self.client.refusal, retry_after_s=5.0)

    def resolve_model(self, name: str | None, tenant: str | None = None) -> str:
        """The served name, which answers carry, for what a client asked for: itself, an alias, or an adapter, which has its own.

        Args:
            tenant: whom a gateway asks for: adapters may be for some alone.
        Raises:
            RequestError: NOT_FOUND.
        """
        if not name or name in self.model_names:
            return self.model_id
        if self.adapters.find(name, tenant) is None:
            self.limits.check_name("model", name)
            raise RequestError(
                ErrorKind.NOT_FOUND,
                f"The model {name!r} does not exist; this server serves {self.model_id!r} (also named 'default').",
                param="model",
                code="model_not_found",
            )
        return name

    def voice(self, model: str | None = None, tenant: str | None = None) -> Voice:
        """How a served model reads and writes text.

        Raises:
            RequestError: NOT_FOUND.
        """
        return self.adapters.voice(self.adapters.find(self.resolve_model(model, tenant), tenant))

    async def compile_tools(self, grammar: str, voice: Voice) -> ConstraintFactory | None:
        """What holds a completion to the grammar of `plan_tools`, made off the event loop; None where the engine is
        remote and compiles the source itself.

        Raises:
            RequestError: INVALID_ARGUMENT about the tools: not enforceable, or too slow to compile.
        """
        compiler = getattr(voice.grammar_compiler, "compile_tools", None)
        if compiler is None:
            return None
        return await self._threads.compile(compiler, grammar, "The tools' schemas took", "tools")

    # -- inside ------------------------------------------------------------------------------------------------------

    def _can(self, task: str) -> bool:
        """Whether the served model is made for "generate", "embed", "score" or "classify", and its engine does it."""
        client = self.client
        able = {"embed": client.embedder, "score": client.scorer, "classify": client.classifier}
        return task in self.info.tasks and (task == "generate" or able[task] is not None)

    def _check_task(self, task: str, lacks: str) -> None:
        if not self._can(task):
            raise RequestError(ErrorKind.UNIMPLEMENTED, f"The model {self.model_id!r} {lacks}.", param="model")

    def _check_reads(self, given: GenerateInput | ScoreInput, task: str, lacks: str) -> None:
        """Checks a request that is only read, as far as that needs no tokens."""
        self.check_ready()
        self.resolve_model(given.model)
        self._check_task(task, lacks)
        given.check(self.limits)

    async def _one(self, live: LiveRequest, index: int) -> AsyncGenerator[TextOutput, None]:
        prepared, request = live.prepared, live.prepared.children[index]
        reader = prepared.reader() if prepared.reader is not None else None
        how = prepared.tokenizer, prepared.markers, reader, prepared.continues
        stream = TextStream(index, request.params, request.eos_token_ids, *how)
        outputs = cast(AsyncGenerator[EngineOutput, None], self.client.generate(request))  # can be closed: its contract
        async with contextlib.aclosing(outputs):
            async for output in outputs:
                try:
                    text = stream.push(output)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:
                    log.error("text of request %s could not be made", request.request_id, exc_info=error)
                    raise RequestError(
                        ErrorKind.INTERNAL, "The server failed to make this completion's text; its log says why."
                    ) from error
                failure = None if stream.stopped else live.failure(output)
                if failure is not None:
                    if text.text or text.token_ids:
                        yield dataclasses.replace(text, finish_reason=None)
                    raise failure
                yield text
                if text.finish_reason is not None:
                    return

    async def counted(self) -> contextlib.AbstractContextManager[None]:
        """Counts a request without completions: against its key's rate, and among those that are live."""
        if caller := caller_of_task.get():
            caller.check_requests()
        await self._rates.ask(caller.name if caller else "")
        return self._live.counted(1, caller and caller.share(None))

    async def _compile(self, grammar: StructuredOutputs, voice: Voice) -> ConstraintFactory:
        if voice.grammar_compiler is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED, "This server has no grammar compiler.", param="structured_outputs"
            )
        return await self._threads.compile(
            voice.grammar_compiler.compile, grammar, "The grammar took", "structured_outputs"
        )
