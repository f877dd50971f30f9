"""Adapters of a running server, for admins: loaded from below one folder, unloaded. The same over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from serving.engine.api.adapters import AdapterInfo
from serving.errors import ErrorKind, RequestError, invalid
from serving.service.adapters import MAX_NAME_CHARS, is_name
from serving.service.service import TextService

log = logging.getLogger(__name__)

MAX_TENANTS = 1024


class AdapterControl:
    """Acts on one service's adapters. Callers have been checked: `Access.check_control`.

    Args:
        folder: where adapters that are loaded while the server runs must lie; None: none may be loaded so.
    """

    def __init__(self, service: TextService, folder: Path | None) -> None:
        self._service = service
        self._folder = None if folder is None else folder.resolve()

    async def load(
        self, name: str, path: str, replace: bool = False, tenants: tuple[str, ...] | None = None
    ) -> AdapterInfo:
        """Reads an adapter and serves it from now on as the model `name`.

        Args:
            tenants: names of the keys that may use it; None: all may.
        Raises:
            RequestError: FAILED_PRECONDITION (the server takes none), PERMISSION_DENIED (a path outside the folder),
                INVALID_ARGUMENT (a name in use, an adapter that cannot be served).
        """
        adapters = self._service.adapters
        adapters.client  # noqa: B018 - says that there is none before anything else is said
        check_name(name, self._service)
        if tenants is not None and (len(tenants) > MAX_TENANTS or not all(tenants)):
            raise invalid(f"tenants must be names of keys, {MAX_TENANTS} at most.", "tenants")
        where = self._inside(path)
        try:
            info = await asyncio.to_thread(
                adapters.load, name, str(where), replace, within=self._folder, tenants=tenants
            )
        except (ValueError, OSError) as error:
            raise invalid(str(error), "lora_path") from error
        log.warning("control: adapter %s: %d matrices of rank %d at most", name, info.num_matrices, info.rank)
        return info

    async def unload(self, name: str) -> AdapterInfo:
        """Forgets an adapter. What runs with it ends with it.

        Raises:
            RequestError: FAILED_PRECONDITION, NOT_FOUND.
        """
        adapters = self._service.adapters
        adapters.client  # noqa: B018 - as above
        try:
            info = await asyncio.to_thread(adapters.unload, name)
        except KeyError:
            raise RequestError(
                ErrorKind.NOT_FOUND, f"There is no adapter {name!r}.", param="lora_name", code="not_found"
            ) from None
        log.warning("control: adapter %s unloaded", name)
        return info

    def _inside(self, path: str) -> Path:
        if self._folder is None:
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                "No adapter can be loaded while the server runs: start it with --lora-folder, below which they lie.",
                param="lora_path",
            )
        try:
            where = (self._folder / path).resolve()
        except (OSError, ValueError, RuntimeError):
            raise invalid("lora_path is no path.", "lora_path") from None
        if not where.is_relative_to(self._folder):
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                "lora_path is not below the folder that adapters are loaded from.",
                param="lora_path",
            )
        return where


def check_name(name: str, service: TextService) -> None:
    """Refuses names that are no names, or the base model's."""
    if not is_name(name):
        raise invalid(
            "lora_name must be letters, digits, '.', '_', ':' and '-', in parts that '/' divides, "
            f"{MAX_NAME_CHARS} characters at most.",
            "lora_name",
        )
    if name in service.model_names:
        raise invalid(f"{name!r} is the base model's name.", "lora_name")
