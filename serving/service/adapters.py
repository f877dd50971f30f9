"""The adapters of a service: whom each is for, how it reads and writes text, and who finds those that nobody has loaded."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from serving.access.keys import Caller, Role, caller_of_task
from serving.engine.api.adapters import AdapterClient, AdapterInfo, LoRARequest
from serving.engine.api.client import EngineClient
from serving.errors import ErrorKind, RequestError
from serving.service.voice import Voice, voice_of_adapter

log = logging.getLogger(__name__)

MAX_NAME_CHARS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]*(?:/[A-Za-z0-9][A-Za-z0-9._:-]*)*")

_COPIES = re.compile(r"(?:-unsloth)?(?:-bnb)?-4bit$|-(?:gguf|awq|gptq|fp8|fp8-dynamic|int4|int8|8bit|w4a16|w8a8)$")

SENSES = {"image": "image", "video": "video", "sound": "audio"}
"""What requests bring along, by the names that vLLM has for it."""
CLOSED = "This server takes no adapters: start it with --enable-lora."


class Resolver(Protocol):
    """Finds adapters that nobody has loaded, by what requests call them."""

    async def resolve(self, base_model: str, name: str) -> LoRARequest | None:
        """Where the adapter of that name is; None where this one knows none. `lora_name` is not looked at.

        Args:
            base_model: the served model's name.
            name: as a request gave it; `is_name` holds.
        """
        ...


def is_name(name: object) -> bool:
    """Whether an adapter may be called so: letters, digits, '.', '_', ':' and '-', in parts that '/' divides."""
    return isinstance(name, str) and len(name) <= MAX_NAME_CHARS and _NAME.fullmatch(name) is not None


def plain_model(name: str) -> str:
    """A model's name without whose copy it is and how that is quantized: adapters that were trained on a 4-bit copy name it."""
    return _COPIES.sub("", name.rstrip("/").rpartition("/")[2].lower())


class Adapters:
    """What of adapters concerns requests and text. Belongs to a `TextService`; `load` and `unload` may be called from any thread.

    Args:
        engine: whose adapters they are.
        base: how the served model reads and writes.
        base_names: what it is called, the name that answers carry first.
    Attributes:
        resolvers: asked in turn for a model that is not known, before it is refused.
        by_sense: of "image", "video" and "audio", the adapter with which requests that bring such a thing are answered, where they
            name none.
    """

    def __init__(self, engine: EngineClient, base: Voice, base_names: Sequence[str]) -> None:
        self._engine = engine
        self._base = base
        self._base_names = tuple(base_names)
        self._voices: dict[str, tuple[AdapterInfo, Voice]] = {}  # by name
        self._given: dict[str, tuple[AdapterInfo, str]] = {}  # by name: the path or hub id that it was asked for by
        self._resolving = asyncio.Lock()
        self.resolvers: Sequence[Resolver] = ()
        self.by_sense: Mapping[str, str] = {}

    @property
    def open(self) -> bool:
        """Whether the engine takes adapters."""
        return self._engine.adapters is not None

    @property
    def client(self) -> AdapterClient:
        """What loads and lists them.

        Raises:
            RequestError: FAILED_PRECONDITION where the engine takes none.
        """
        found = self._engine.adapters
        if found is None:
            raise RequestError(ErrorKind.FAILED_PRECONDITION, CLOSED)
        return found

    # -- whom they are for -------------------------------------------------------------------------------------------

    def find(self, name: str, tenant: str | None = None) -> AdapterInfo | None:
        """The adapter of a name; None where there is none, or none for whom the running task serves.

        Args:
            tenant: whom the caller says that it asks for.
        """
        info = None if self._engine.adapters is None else self._engine.adapters.find(name)
        return info if info is not None and may_use(info, caller_of_task.get(), tenant) else None

    def wanted(self, name: str, tenant: str | None, brought: Collection[str]) -> AdapterInfo | None:
        """The adapter that a request for a name is answered with: the one of that name, or of what it brings along.

        Args:
            brought: "image", "video" or "sound" of what it does; the first of the three decides.
        """
        if (found := self.find(name, tenant)) is not None or not self.by_sense:
            return found
        for what, sense in SENSES.items():
            if what in brought and sense in self.by_sense and self._engine.adapters is not None:
                return self._engine.adapters.find(self.by_sense[sense])
        return None

    def visible(self) -> list[AdapterInfo]:
        """Those for whom the running task serves, in the order in which they were loaded."""
        infos = [] if self._engine.adapters is None else self._engine.adapters.infos()
        return [info for info in infos if may_use(info, caller_of_task.get())]

    # -- text --------------------------------------------------------------------------------------------------------

    def voice(self, info: AdapterInfo | None) -> Voice:
        """How an adapter reads and writes; the base's where it has no way of its own, or None is given.

        Raises:
            RequestError: UNIMPLEMENTED where its way is only known to the server that has it.
        """
        if info is None:
            return self._base
        if info.own_text:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED,
                f"The adapter {info.name!r} has a chat template or tokens of its own: ask the server that has it.",
                param="model",
            )
        known = self._voices.get(info.name)
        return self._base if known is None or known[0].digest != info.digest else known[1]

    def has_own_text(self, info: AdapterInfo) -> bool:
        """Whether it reads and writes in a way of its own."""
        return info.own_text or self.voice(info) is not self._base

    # -- loading -----------------------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        path: str,
        replace: bool = False,
        *,
        within: Path | None = None,
        tenants: tuple[str, ...] | None = None,
    ) -> AdapterInfo:
        """Reads an adapter, and its tokenizer and template where it has some. Blocks; see `AdapterClient.load`.

        Raises:
            ValueError, RequestError: it cannot be served, in a sentence.
        """
        folder = self.client.locate(path) if within is None else Path(path)
        _check_links(folder, within)
        voice = voice_of_adapter(folder, self._base, self._engine.info().vocab_size)
        info = self.client.load(name, str(folder), replace, within=within, tenants=tenants)
        if info.base and plain_model(info.base) not in map(plain_model, self._base_names):
            log.info("adapter %s was trained on %s; here it is beside %s", name, info.base, self._base_names[0])
        self._given[name] = info, path
        if voice is None:
            self._voices.pop(name, None)
        else:
            self._voices[name] = info, voice
        return info

    def asked_for(self, given: LoRARequest | Sequence[LoRARequest | None] | None, count: int) -> list[str | None]:
        """Which adapter each of so many requests is for, by its name; None for the base. What is not known by its name, or from
        another path, is loaded. Blocks.

        Args:
            given: one for all, or one each.
        Raises:
            ValueError: another number of them, no room for adapters, or one that cannot be served.
        """
        asked = [given] * count if given is None or isinstance(given, LoRARequest) else list(given)
        if len(asked) != count:
            raise ValueError(
                f"lora_request has {len(asked)} entries for {count} prompts; give one each, or one for all."
            )
        wanted = {one.lora_name: one for one in asked if one is not None}
        if wanted and not self.open:
            raise ValueError("This LLM takes no adapters: make it with enable_lora=True.")
        for one in wanted.values():
            known = self.find(one.lora_name)
            moved = one.load_inplace or (known, one.lora_path) != self._given.get(one.lora_name)
            if known is None or (one.lora_path and moved):
                self.load(one.lora_name, one.lora_path, replace=known is not None)
        return [None if one is None else one.lora_name for one in asked]

    def unload(self, name: str) -> AdapterInfo:
        """Forgets an adapter. What runs with it ends with it. Blocks.

        Raises:
            KeyError: there is none of that name.
        """
        info = self.client.unload(name)
        self._voices.pop(name, None)
        self._given.pop(name, None)
        return info

    def _known(self, name: str) -> bool:
        return self._engine.adapters is not None and self._engine.adapters.find(name) is not None

    async def resolve(self, name: str | None) -> None:
        """Has the resolvers look for a model that is not known, and loads what one of them finds. What hinders that is logged:
        the model is then unknown.

        Raises:
            RequestError: UNAVAILABLE, RESOURCE_EXHAUSTED: a resolver says that it cannot be had now.
        """
        if not self.resolvers or not name or name in self._base_names or not is_name(name):
            return
        if self._known(name):
            return
        async with self._resolving:  # several requests for one adapter read it once
            if self._known(name):
                return
            for resolver in self.resolvers:
                try:
                    found = await resolver.resolve(self._base_names[0], name)
                    if found is None:
                        continue
                    within = getattr(resolver, "within", None)
                    info = await asyncio.to_thread(
                        self.load, name, found.lora_path, within=within, tenants=found.tenants
                    )
                except Exception as error:
                    if isinstance(error, RequestError) and error.kind in _NOT_NOW:
                        raise
                    log.warning("adapter %s could not be loaded: %s", name, error)
                    continue
                log.info("adapter %s: %d matrices of rank %d at most", name, info.num_matrices, info.rank)
                return


_NOT_NOW = (ErrorKind.UNAVAILABLE, ErrorKind.RESOURCE_EXHAUSTED)


def _check_links(folder: Path, within: Path | None) -> None:
    """Refuses an adapter that has a file which lies elsewhere than its name says: its template would tell what is in there.

    Raises:
        ValueError: it leads out of the folder, or there are too many files to look at.
    """
    if within is None:
        return
    inside, below = within.resolve(), sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in (folder, *below):
        if not path.resolve().is_relative_to(inside):
            raise ValueError(f"{path.name} leads out of the folder that adapters are loaded from.")


def may_use(info: AdapterInfo, caller: Caller | None, tenant: str | None = None) -> bool:
    """Whether an adapter is for a caller: for all where nothing is said; else for the keys that are named, for admins, and for
    gateways, which are asked by keys of their own."""
    return for_caller(info.tenants, caller, tenant)


def for_caller(tenants: Sequence[str] | None, caller: Caller | None, tenant: str | None = None) -> bool:
    """`may_use` of anything that is for the keys named in `tenants`; None: for all."""
    if tenants is None:
        return True
    if caller is None:
        return False
    if caller.name in tenants or caller.role is Role.ADMIN:
        return True
    return caller.role is Role.PROXY and (tenant is None or tenant in tenants)
