"""Base classes of bodies, whatever the dialect: strict requests that refuse by name what is not done, and replies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from serving.errors import invalid

LEAVE = "leave it out."


class ApiRequest(BaseModel):
    """A part of a request body. Unknown fields are ignored, as OpenAI's server does; wrong types are refused, not converted."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, protected_namespaces=())


T = TypeVar("T")


class _FailFast(FailFast):
    def __hash__(self) -> int:  # members of a typing.Union must have one
        return hash(type(self))


Many = Annotated[list[T], _FailFast()]
"""A list whose first wrong element ends the check: the others would be looked at one by one, and an error made for each."""

Refused = Mapping[str, tuple[tuple[Any, ...], str]]
"""Field -> the values that change nothing beside null, and what to do instead of asking for another one."""


class ApiBody(ApiRequest):
    """A whole request body. A field of the API, or of a server whose clients are likely to come here, that would change the
    answer and is not done is refused by its name (`REFUSED`): dropping it would answer another question."""

    REFUSED: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data.keys() & cls.REFUSED.keys():
                harmless, instead = cls.REFUSED[name]
                value = data[name]
                if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
                    raise invalid(f"{name} is not supported by this server: {instead}", name, "unsupported_parameter")
        return data

    def names(self) -> dict[str, str]:
        """The service's names of fields -> those that this client used, for `serving.errors.named`."""
        return {}

    def force_usage(self) -> None:
        """Asks for token counts at a stream's end, on the operator's behalf. Nothing to do where they come anyhow."""


class ApiReply(BaseModel):
    """A reply body. Extras that were not asked for are left out of the JSON by the endpoints."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


def number(low: int | None = None, high: int | None = None, default: Any = None, text: str | None = None) -> Any:
    """A number whose range is told in the API document. It is checked, with better words, by SamplingParams."""
    extra: dict[str, Any] = {}
    if low is not None:
        extra["minimum"] = low
    if high is not None:
        extra["maximum"] = high
    return Field(default=default, description=text, json_schema_extra=extra or None)
