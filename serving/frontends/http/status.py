"""Where a model is, as lists of models tell it on a server that has several."""

from __future__ import annotations

from typing import Any

from serving.service import TextService


def status_of(service: TextService) -> dict[str, Any]:
    """The state of a service's model, which has a `residence`: its `value` is one of `Where`'s."""
    residence = service.client.residence
    assert residence is not None
    told: dict[str, Any] = {
        "value": residence.where.value,
        "pinned": residence.pinned,
        "aliases": list(residence.aliases),
        "device_bytes": residence.device_bytes,
        "running": service.num_live,
    }
    if residence.progress is not None:
        told["progress"] = residence.progress
    if residence.error is not None:
        told["error"] = residence.error
    return told
