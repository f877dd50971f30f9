"""The calls of Control about adapters, and those that change the server: these need an admin key, and are closed without one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from proto.jaxserve.v1 import control_pb2
from serving.access import Access, caller_of_task
from serving.engine.api.adapters import AdapterInfo
from serving.errors import ErrorKind, RequestError, named
from serving.frontends.grpc import pages
from serving.service import TextService
from serving.service.adapter_control import AdapterControl
from serving.service.control import ServerControl, State


class ControlCalls:
    """Pause, Resume, Sleep, WakeUp, Drain, ResetPrefixCache, UpdateWeights, LoadAdapter, UnloadAdapter, ListAdapters; and
    WatchPages, which tells others' prompts.

    Args:
        service: gives the service, or raises UNAVAILABLE while there is none yet.
        access: who may.
        lora_folder: below which adapters lie that admins may load; None: they may load none.
    """

    def __init__(self, service: Callable[[], TextService], access: Access, lora_folder: Path | None = None) -> None:
        self._service = service
        self._access = access
        self._lora_folder = lora_folder

    async def Pause(self, request: Any, context: Any) -> control_pb2.PauseResponse:  # noqa: N802 - as in the .proto
        return control_pb2.PauseResponse(state=_state(await self._control().pause()))

    async def Resume(self, request: Any, context: Any) -> control_pb2.ResumeResponse:  # noqa: N802
        return control_pb2.ResumeResponse(state=_state(await self._control().resume()))

    async def Sleep(self, request: control_pb2.SleepRequest, context: Any) -> control_pb2.SleepResponse:  # noqa: N802
        return control_pb2.SleepResponse(
            state=_state(await self._control().sleep(request.level if request.HasField("level") else 1))
        )

    async def WakeUp(self, request: Any, context: Any) -> control_pb2.WakeUpResponse:  # noqa: N802
        return control_pb2.WakeUpResponse(state=_state(await self._control().wake()))

    async def Drain(self, request: control_pb2.DrainRequest, context: Any) -> control_pb2.DrainResponse:  # noqa: N802
        timeout = request.timeout_s if request.HasField("timeout_s") else None
        return control_pb2.DrainResponse(state=_state(await self._control().drain(timeout)))

    async def ResetPrefixCache(self, request: Any, context: Any) -> control_pb2.ResetPrefixCacheResponse:  # noqa: N802
        return control_pb2.ResetPrefixCacheResponse(state=_state(await self._control().reset_prefix_cache()))

    async def UpdateWeights(  # noqa: N802
        self, request: control_pb2.UpdateWeightsRequest, context: Any
    ) -> control_pb2.UpdateWeightsResponse:
        return control_pb2.UpdateWeightsResponse(state=_state(await self._control().update_weights(request.source)))

    async def WatchPages(  # noqa: N802
        self, request: control_pb2.WatchPagesRequest, context: Any
    ) -> AsyncIterator[control_pb2.WatchPagesResponse]:
        self._access.check_watch(caller_of_task.get())
        events = self._service().client.page_events
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
            info = await self._adapters().load(
                request.name, request.path, request.load_inplace, tenants=tuple(request.tenants) or None
            )
        return control_pb2.LoadAdapterResponse(adapter=loaded_adapter(self._service(), info))

    async def UnloadAdapter(  # noqa: N802
        self, request: control_pb2.UnloadAdapterRequest, context: Any
    ) -> control_pb2.UnloadAdapterResponse:
        with named({"lora_name": "name"}):
            await self._adapters().unload(request.name)
        return control_pb2.UnloadAdapterResponse()

    async def ListAdapters(  # noqa: N802
        self, request: control_pb2.ListAdaptersRequest, context: Any
    ) -> control_pb2.ListAdaptersResponse:
        service = self._service()
        return control_pb2.ListAdaptersResponse(
            adapters=[loaded_adapter(service, info) for info in service.adapters.visible()]
        )

    def _control(self) -> ServerControl:
        self._access.check_control(caller_of_task.get())
        return ServerControl(self._service())

    def _adapters(self) -> AdapterControl:
        self._access.check_control(caller_of_task.get())
        return AdapterControl(self._service(), self._lora_folder)


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
