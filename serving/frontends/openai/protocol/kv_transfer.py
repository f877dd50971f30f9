"""vLLM's `kv_transfer_params`: what its proxies put into the requests to the engine that prefills and to the one that decodes.

The proxy sends `do_remote_decode` to the first, and what that one answers, unread, to the second. Fields of vLLM's that name
blocks are taken and not looked at: here the second engine asks for the pages of its prompt's tokens, whatever their numbers are.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from serving.engine.api.types import TransferParams
from serving.frontends.http.models import ApiRequest


class KVTransferParams(ApiRequest):
    """Which part of a request another engine does."""

    do_remote_decode: bool | None = None
    do_remote_prefill: bool | None = None
    remote_host: str | None = None
    remote_port: int | None = Field(default=None, ge=1, le=65535)
    remote_request_id: str | None = None
    remote_engine_id: str | None = None

    def to_service(self) -> TransferParams:
        """The service's form."""
        return TransferParams(
            bool(self.do_remote_decode), bool(self.do_remote_prefill), self.remote_host or "", self.remote_port or 0,
            self.remote_request_id or "",
        )  # fmt: skip


def reply_of(params: TransferParams | None, address: tuple[str, int] | None) -> dict[str, Any] | None:
    """What a reply tells the engine that goes on; None where there is none.

    Args:
        address: host and port of this server's gRPC.
    """
    if params is None or address is None:
        return None
    host, port = address
    return {
        "do_remote_prefill": params.remote_prefill,
        "do_remote_decode": params.remote_decode,
        "remote_block_ids": [],
        "remote_engine_id": f"{host}:{port}",
        "remote_request_id": params.ticket,
        "remote_host": host,
        "remote_port": port,
        "tp_size": 1,
    }
