"""/classify, in vLLM's shape."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from serving.frontends.http.models import LEAVE, ApiReply, Refused
from serving.frontends.openai.protocol.common import UsageReply
from serving.frontends.openai.protocol.reading import ReadingRequest

CLASSIFY_REFUSED: Refused = {
    "padding": ((False,), "no text is padded here."),
    "prompt_embeds": ((), "send text or token ids."),
    "chat_template": ((), "the server's own is used; --chat-template sets it."),
    "mm_processor_kwargs": (({},), LEAVE),
}


class ClassifyRequest(ReadingRequest):
    """Texts to classify."""

    REFUSED: ClassVar[Refused] = CLASSIFY_REFUSED

    use_activation: bool | None = Field(default=None, description="false: the model's logits instead of probabilities.")
    activation: bool | None = Field(default=None, description="An older name of use_activation.")

    @property
    def raw(self) -> bool:
        """Whether logits are asked for."""
        return self.use_activation is False or (self.use_activation is None and self.activation is False)


class Classified(ApiReply):
    index: int
    label: str | None
    probs: list[float]
    num_classes: int


class ClassifyReply(ApiReply):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: UsageReply
