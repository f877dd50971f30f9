"""The place of a service's model among those of its server, for those who move it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from serving.engine.api.client import Residence
from serving.errors import ErrorKind, RequestError

if TYPE_CHECKING:
    from serving.service.service import TextService


def residence_of(service: TextService) -> Residence:
    """Where the model of a service is.

    Raises:
        RequestError: FAILED_PRECONDITION: it is the only one, and stays.
    """
    residence = service.client.residence
    if residence is None:
        raise RequestError(
            ErrorKind.FAILED_PRECONDITION,
            f"This server has one model, {service.model_id!r}, and keeps it: start it with several (--model twice, or --models). "
            "To give its memory back, POST /sleep.",
        )
    return residence
