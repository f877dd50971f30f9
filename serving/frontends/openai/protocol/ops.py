"""/v1/models, /health, /ready, /version."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.frontends.openai.protocol.common import ApiReply


class ModelCard(ApiReply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxserve"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    default_sampling_params: dict[str, Any] | None = Field(
        default=None, description="What is in force where a request names nothing, beside the API's own defaults."
    )


class ModelList(ApiReply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class StatusReply(ApiReply):
    status: str


class VersionReply(ApiReply):
    version: str
