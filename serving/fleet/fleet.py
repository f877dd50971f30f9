"""Several models as one thing to serve: who answers to which name, for whom, and what concerns all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from serving.access.keys import caller_of_task
from serving.engine.api.adapters import LoRARequest
from serving.errors import ErrorKind, RequestError
from serving.fleet.keeper import Keeper
from serving.service import Limits, TextService
from serving.service.adapters import for_caller

MAX_NAMES_TOLD = 20


class Fleet:
    """`serving.service.Served` of several models.

    Args:
        services: one a model; requests that name none get the first.
        tenants: model -> the names of the keys that may use it; models that are left out are for all.
        keeper: who loads them; runs.
    """

    def __init__(
        self, services: Sequence[TextService], tenants: Mapping[str, tuple[str, ...]] = {}, keeper: Keeper | None = None
    ) -> None:
        self.services: Sequence[TextService] = tuple(services)
        self.keeper = keeper
        self._tenants = dict(tenants)
        self._by_name: dict[str, TextService] = {}
        for service in services:
            for name in service.model_names:
                self._by_name.setdefault(name, service)
        self._by_adapter: dict[str, tuple[TextService, LoRARequest]] = {}
        self.limits: Limits = services[0].limits
        self.created = int(time.time())
        self.started = time.monotonic()
        self.draining_listeners: list[Callable[[bool], None]] = []

    # -- models --------------------------------------------------------------------------------------------------------

    @property
    def first(self) -> TextService:
        return self.services[0]

    def of(self, model: str | None, tenant: str | None = None) -> TextService:
        """See Served.of. Names of models come before those of adapters."""
        if not model:
            return next(iter(self.visible()), None) or self._unknown("default", tenant)
        service = self._by_name.get(model)
        if service is not None and self._may_use(service, tenant):
            return service
        if service is None and model in self._by_adapter:
            service, given = self._by_adapter[model]
            if self._may_use(service, tenant) and for_caller(given.tenants, caller_of_task.get(), tenant):
                return service
        if service is None:
            for one in self.services:
                if self._may_use(one, tenant) and one.adapters.find(model, tenant) is not None:
                    return one
        return self._unknown(model, tenant)

    def declare(self, service: TextService, given: Sequence[LoRARequest]) -> None:
        """Adapters of one of the models, which a request may name before they, or it, are loaded."""
        self._by_adapter |= {one.lora_name: (service, one) for one in given}
        service.adapters.resolvers = (*service.adapters.resolvers, _Declared(service, given))

    def visible(self) -> Sequence[TextService]:
        return [service for service in self.services if self._may_use(service, None)]

    def _may_use(self, service: TextService, tenant: str | None) -> bool:
        return for_caller(self._tenants.get(service.model_id), caller_of_task.get(), tenant)

    def _unknown(self, model: str, tenant: str | None) -> TextService:
        self.limits.check_name("model", model)
        names = [service.model_id for service in self.services if self._may_use(service, tenant)]
        more = f" and {len(names) - MAX_NAMES_TOLD} more" if len(names) > MAX_NAMES_TOLD else ""
        known = ", ".join(map(repr, names[:MAX_NAMES_TOLD])) or "none"
        raise RequestError(
            ErrorKind.NOT_FOUND,
            f"The model {model!r} does not exist; this server serves {known}{more}.",
            param="model",
            code="model_not_found",
        )

    # -- all of them together --------------------------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        return sum(service.num_live for service in self.services)

    @property
    def draining(self) -> bool:
        return self.first.draining

    def start_draining(self) -> None:
        self._tell_draining(True)

    def stop_draining(self) -> None:
        self._tell_draining(False)

    def _tell_draining(self, draining: bool) -> None:
        for service in self.services:
            service.start_draining() if draining else service.stop_draining()
        for tell in self.draining_listeners:
            tell(draining)

    async def wait_idle(self, timeout_s: float) -> bool:
        return all(await asyncio.gather(*(service.wait_idle(timeout_s) for service in self.services)))

    def check_ready(self) -> None:
        self.first.check_ready()

    async def abort(self, request_id: str) -> bool:
        return any([await service.abort(request_id) for service in self.services])

    async def abort_all(self, within_s: float = 1.0) -> None:
        if self.keeper is not None:
            await self.keeper.stop()
        await asyncio.gather(*(service.abort_all(within_s) for service in self.services))

    async def rehearse(self) -> None:
        await asyncio.gather(*(service.rehearse() for service in self.services))


class _Declared:
    """The `Resolver` of a model's own adapters: it has the model loaded first."""

    def __init__(self, service: TextService, given: Sequence[LoRARequest]) -> None:
        self._service = service
        self._given = {one.lora_name: one for one in given}

    async def resolve(self, base_model: str, name: str) -> LoRARequest | None:
        """See Resolver.resolve."""
        found, residence = self._given.get(name), self._service.client.residence
        if found is not None and residence is not None:
            await residence.load()
        return found
