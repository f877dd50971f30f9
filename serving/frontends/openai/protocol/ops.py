"""/v1/models, /health, /ready, /version."""

from __future__ import annotations

from typing import Literal

from serving.frontends.openai.protocol.common import ApiReply


class ModelCard(ApiReply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxserve"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(ApiReply):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class StatusReply(ApiReply):
    status: str


class VersionReply(ApiReply):
    version: str
