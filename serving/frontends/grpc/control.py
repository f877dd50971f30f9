"""The calls of Control about adapters, and those that change the server: these need an admin key, and are closed without one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from proto.jaxserve.v1 import control_pb2
from serving.access import Access, caller_of_task
from serving.engine.api.adapters import AdapterInfo
from serving.engine.api.client import Residence, Where
from serving.errors import ErrorKind, RequestError, named
from serving.frontends.grpc import pages
from serving.service import Served, TextService
from serving.service.adapter_control import AdapterControl
from serving.service.control import ServerControl, State
from serving.service.residence import residence_of


class ControlCalls:
    """Pause, Resume, Sleep, WakeUp, Drain, ResetPrefixCache, UpdateWeights, LoadAdapter, UnloadAdapter, ListAdapters, LoadModel,
    UnloadModel, ListModels; and WatchPages, which tells others' prompts.

    Args:
        service: gives what is served, or raises UNAVAILABLE while there is nothing yet.
        access: who may.
        lora_folder: below which adapters lie that admins may load; None: they may load none.
    """

    def __init__(self, service: Callable[[], Served], access: Access, lora_folder: Path | None = None) -> None:
        self._service = service
        self._access = access
        self._lora_folder = lora_folder

    async def Pause(self, request: Any, context: Any) -> control_pb2.PauseResponse:  # noqa: N802 - as in the .proto
        return control_pb2.PauseResponse(state=_state(await self._control(request.model).pause()))

    async def Resume(self, request: Any, context: Any) -> control_pb2.ResumeResponse:  # noqa: N802
        return control_pb2.ResumeResponse(state=_state(await self._control(request.model).resume()))

    async def Sleep(self, request: control_pb2.SleepRequest, context: Any) -> control_pb2.SleepResponse:  # noqa: N802
        return control_pb2.SleepResponse(
            state=_state(await self._control(request.model).sleep(request.level if request.HasField("level") else 1))
        )

    async def WakeUp(self, request: Any, context: Any) -> control_pb2.WakeUpResponse:  # noqa: N802
        return control_pb2.WakeUpResponse(state=_state(await self._control(request.model).wake()))

    async def Drain(self, request: control_pb2.DrainRequest, context: Any) -> control_pb2.DrainResponse:  # noqa: N802
        timeout = request.timeout_s if request.HasField("timeout_s") else None
        return control_pb2.DrainResponse(state=_state(await self._control("").drain(timeout)))

    async def ResetPrefixCache(self, request: Any, context: Any) -> control_pb2.ResetPrefixCacheResponse:  # noqa: N802
        return control_pb2.ResetPrefixCacheResponse(
            state=_state(await self._control(request.model).reset_prefix_cache())
        )

    async def UpdateWeights(  # noqa: N802
        self, request: control_pb2.UpdateWeightsRequest, context: Any
    ) -> control_pb2.UpdateWeightsResponse:
        return control_pb2.UpdateWeightsResponse(
            state=_state(await self._control(request.model).update_weights(request.source))
        )

    async def WatchPages(  # noqa: N802
        self, request: control_pb2.WatchPagesRequest, context: Any
    ) -> AsyncIterator[control_pb2.WatchPagesResponse]:
        self._access.check_watch(caller_of_task.get())
        events = self._service().of(request.model).client.page_events
        if events is None:
            raise RequestError(
                ErrorKind.UNIMPLEMENTED, "This server tells nothing of its pages: start it with --kv-events-config."
            )
        async for message in pages.follow(events, request):
            yield message

    async def LoadAdapter(  # noqa: N802
        self, request: control_pb2.LoadAdapterRequest, context: Any
    ) -> control_pb2.LoadAdapterResponse:
        with named({"lora_name": "name", "lora_path": "path"}):
            info = await self._adapters(request.base_model).load(
                request.name, request.path, request.load_inplace, tenants=tuple(request.tenants) or None
            )
        return control_pb2.LoadAdapterResponse(adapter=loaded_adapter(self._service().of(request.base_model), info))

    async def UnloadAdapter(  # noqa: N802
        self, request: control_pb2.UnloadAdapterRequest, context: Any
    ) -> control_pb2.UnloadAdapterResponse:
        with named({"lora_name": "name"}):
            await self._adapters(request.name).unload(request.name)
        return control_pb2.UnloadAdapterResponse()

    async def ListAdapters(  # noqa: N802
        self, request: control_pb2.ListAdaptersRequest, context: Any
    ) -> control_pb2.ListAdaptersResponse:
        return control_pb2.ListAdaptersResponse(adapters=loaded_adapters(self._service()))

    async def ListModels(  # noqa: N802
        self, request: control_pb2.ListModelsRequest, context: Any
    ) -> control_pb2.ListModelsResponse:
        return control_pb2.ListModelsResponse(models=[model_status(one) for one in self._service().visible()])

    async def LoadModel(  # noqa: N802
        self, request: control_pb2.LoadModelRequest, context: Any
    ) -> control_pb2.LoadModelResponse:
        service, residence = self._residence(request.model)
        if request.HasField("pinned"):
            residence.pin(request.pinned)
        await residence.load()
        return control_pb2.LoadModelResponse(model=model_status(service))

    async def UnloadModel(  # noqa: N802
        self, request: control_pb2.UnloadModelRequest, context: Any
    ) -> control_pb2.UnloadModelResponse:
        service, residence = self._residence(request.model)
        await (residence.sleep() if request.sleep else residence.unload())
        return control_pb2.UnloadModelResponse(model=model_status(service))

    def _control(self, model: str) -> ServerControl:
        self._access.check_control(caller_of_task.get())
        served = self._service()
        return ServerControl(served.of(model), served)

    def _adapters(self, model: str) -> AdapterControl:
        """Of the model with this name, or with the adapter of this name."""
        self._access.check_control(caller_of_task.get())
        return AdapterControl(self._service().of(model), self._lora_folder)

    def _residence(self, model: str) -> tuple[TextService, Residence]:
        self._access.check_control(caller_of_task.get())
        service = self._service().of(model)
        return service, residence_of(service)


def model_status(service: TextService) -> control_pb2.ModelStatus:
    """Where a model is; the only one of a server is loaded."""
    residence = service.client.residence
    if residence is None:
        return control_pb2.ModelStatus(
            name=service.model_id, names=service.model_names, state=Where.LOADED.value, pinned=True
        )
    return control_pb2.ModelStatus(
        name=service.model_id,
        names=service.model_names,
        state=residence.where.value,
        pinned=residence.pinned,
        device_bytes=residence.device_bytes,
        num_live=service.num_live,
        progress=residence.progress or "",
        error=residence.error or "",
    )


def loaded_adapters(served: Served) -> list[control_pb2.LoadedAdapter]:
    """Those of all models that the caller may use."""
    return [loaded_adapter(one, info) for one in served.visible() for info in one.adapters.visible()]


def loaded_adapter(service: TextService, info: AdapterInfo) -> control_pb2.LoadedAdapter:
    return control_pb2.LoadedAdapter(
        name=info.name,
        path=info.path,
        digest=info.digest,
        rank=info.rank,
        num_matrices=info.num_matrices,
        tenants=info.tenants or (),
        own_text=service.adapters.has_own_text(info),
    )


def _state(state: State) -> control_pb2.ControlState:
    return control_pb2.ControlState(
        paused=state.paused, asleep=state.asleep, draining=state.draining, num_live=state.num_live
    )
