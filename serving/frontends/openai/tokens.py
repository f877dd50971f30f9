"""/tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from serving.errors import invalid
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
)
from serving.service import GenerateInput, TextService


def tokens_router(service: TextService) -> APIRouter:
    """Routes between text and token ids."""
    router = APIRouter(tags=["tokens"], responses={k: RESPONSES[k] for k in (400, 404, 413, 500)})

    @router.post("/tokenize", response_model=TokenizeReply)
    async def tokenize(body: TokenizeRequest) -> Response:
        """The ids that a generation from the same prompt or messages would run."""
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        chat = body.messages is not None
        kwargs = body.chat_template_kwargs or {}
        _, ids = await service.tokenize(
            GenerateInput(
                text=body.prompt,
                messages=body.messages,
                tools=[t.model_dump(exclude_unset=True) for t in body.tools] if chat and body.tools else None,
                add_special_tokens=body.add_special_tokens,
                add_generation_prompt=body.add_generation_prompt,
                continue_final_message=body.continue_final_message,
                chat_template_kwargs={
                    k: v for k, v in kwargs.items() if v is None or isinstance(v, str | int | float | bool)
                },
                model=body.model,
            )
        )
        reply = {"count": len(ids), "max_model_len": service.info.max_model_len, "tokens": ids, "token_strs": None}
        if body.return_token_strs:
            reply["token_strs"] = [service.tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in ids]
        return JSONResponse(reply)

    @router.post("/detokenize", response_model=DetokenizeReply)
    async def detokenize(body: DetokenizeRequest) -> Response:
        return JSONResponse({"prompt": await service.detokenize(body.tokens, model=body.model)})

    @router.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info() -> Response:
        """What evaluation harnesses ask before they send token ids."""
        tokenizer, template = service.tokenizer, service.chat_template

        def text(token: int | None) -> str | None:
            return None if token is None else tokenizer.token_bytes(token).decode("utf-8", errors="replace")

        return JSONResponse(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": service.info.max_model_len,
                "bos_token": text(tokenizer.bos_token_id),
                "eos_token": text(next(iter(tokenizer.eos_token_ids), None)),
                "pad_token": None,
                "chat_template": getattr(template, "source", None),
            }
        )

    return router
