"""What requests have in common that read texts and complete nothing: embeddings, classification."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from serving.errors import invalid
from serving.frontends.http.models import ApiBody, Many
from serving.frontends.openai.protocol.chat import MESSAGE_SCHEMA
from serving.service.requests.inputs import GenerateInput


class ReadingRequest(ApiBody):
    """Texts to read, or one chat."""

    model: str | None = None
    input: str | Many[str] | Many[int] | Many[Many[int]] | None = Field(
        default=None, description="Text, several texts, token ids, or several lists of token ids."
    )
    messages: Many[dict[str, Any]] | None = Field(
        default=None, description="A chat instead of input.", json_schema_extra={"items": MESSAGE_SCHEMA}
    )
    add_generation_prompt: bool | None = Field(default=None, description="For messages; left out: no.")
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = Field(
        default=None,
        description="Which end is cut off then; left out: the left one for decoders, the right for encoders.",
    )
    priority: int | None = None
    request_id: str | None = None
    user: str | None = Field(default=None, description="Accepted and ignored.")

    def inputs(self) -> list[Any]:
        """Texts, lists of token ids, or the chat alone.

        Raises:
            RequestError: INVALID_ARGUMENT when there is none.
        """
        if (self.input is None) == (self.messages is None):
            raise invalid("Missing required parameter: 'input' (or 'messages', a chat instead).", "input")
        if self.messages is not None:
            return [self.messages]
        if isinstance(self.input, str):
            return [self.input]
        if not self.input:
            raise invalid("input is empty: give text or token ids.", "input")
        return [self.input] if isinstance(self.input[0], int) else list(self.input)

    def given(self, one: Any, request_id: str) -> GenerateInput:
        """One of `inputs`, as the service takes it.

        Args:
            request_id: of a request that names none.
        """
        chat = self.messages is not None
        return GenerateInput(
            text=one if isinstance(one, str) else None,
            token_ids=None if chat or isinstance(one, str) else one,
            messages=self.messages,
            add_generation_prompt=bool(self.add_generation_prompt),
            continue_final_message=bool(self.continue_final_message),
            add_special_tokens=self.add_special_tokens,
            chat_template_kwargs=self.chat_template_kwargs or {},
            truncate_prompt_tokens=self.truncate_prompt_tokens,
            truncation_side=self.truncation_side,
            model=self.model,
            request_id=self.request_id or request_id,
            priority=self.priority or 0,
        )

    def names(self) -> dict[str, str]:
        return {"prompt": "input"} if self.messages is None else {}
