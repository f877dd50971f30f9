"""Which requests are refused at the door, whatever the engine behind it is doing."""

from __future__ import annotations

from serving.engine.api.config import EngineConfig
from serving.errors import ErrorKind, RequestError, invalid


def check_door(*, failed: bool, draining: bool, request_id: str, in_use: bool) -> None:
    """Refuses what no engine in this state takes.

    Raises:
        RequestError: INTERNAL (dead), UNAVAILABLE (draining), INVALID_ARGUMENT (the id is taken).
    """
    if failed:
        raise RequestError(ErrorKind.INTERNAL, "the engine died; the server is going down.")
    if draining:
        raise RequestError(ErrorKind.UNAVAILABLE, "the server is draining.", retry_after_s=5.0)
    if in_use:
        raise invalid(f"request id {request_id!r} is in use.", "request_id")


def check_queue(config: EngineConfig, *, waiting: int, waiting_tokens: int, tokens: int) -> None:
    """Refuses what the waiting queue has no room for. A prompt longer than the whole queue is taken when that is empty.

    Args:
        waiting: requests that wait.
        waiting_tokens: of their prompts; looked at only where `max_num_queued_tokens` is set.
        tokens: of the new prompt.
    Raises:
        RequestError: RESOURCE_EXHAUSTED.
    """
    limit = config.max_num_queued_reqs
    if limit is not None and waiting >= limit:
        raise _full(f"{waiting} requests are waiting; the queue holds {limit}.")
    limit = config.max_num_queued_tokens
    if limit is not None and waiting_tokens and waiting_tokens + tokens > limit:
        raise _full(f"{waiting_tokens} prompt tokens are waiting; the queue holds {limit}.")


def _full(what: str) -> RequestError:
    return RequestError(ErrorKind.RESOURCE_EXHAUSTED, f"{what} Try again later.", code="queue_full", retry_after_s=1.0)
