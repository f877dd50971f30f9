"""/v1/models. https://platform.openai.com/docs/api-reference/models"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.frontends.http.models import ApiReply


class ModelCard(ApiReply):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxserve"
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None
    tasks: list[str] = Field(default=[], description="What it can do: generate, embed, score, classify, transcribe.")
    input_modalities: list[str] = Field(default=[], description="What it reads: text, image, audio.")
    default_sampling_params: dict[str, Any] | None = Field(
        default=None, description="What is in force where a request names nothing, beside the API's own defaults."
    )
    # status: where the model is, where several share the server; absent where there is one


class ModelList(ApiReply):
    object: Literal["list"] = "list"
    data: list[ModelCard]
