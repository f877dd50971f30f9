"""/tokenize, /detokenize, /tokenizer_info."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from serving.errors import invalid, named
from serving.frontends.http.bodies import body_of, takes
from serving.frontends.openai.errors import RESPONSES
from serving.frontends.openai.protocol.tokens import (
    DetokenizeReply,
    DetokenizeRequest,
    TokenizeReply,
    TokenizeRequest,
    TokenizerInfo,
)
from serving.service import GenerateInput, Served, TextService


def tokens_router(served: Served) -> APIRouter:
    """Routes between text and token ids."""
    router = APIRouter(tags=["tokens"], responses={k: RESPONSES[k] for k in (400, 404, 413, 500)})

    @router.post("/tokenize", response_model=TokenizeReply, openapi_extra=takes(TokenizeRequest))
    async def tokenize(body: Annotated[TokenizeRequest, Depends(body_of(TokenizeRequest))]) -> Response:
        """The ids that a generation from the same prompt or messages would run."""
        if (body.prompt is None) == (body.messages is None):
            raise invalid("Give either prompt or messages.", "prompt")
        service = served.of(body.model)
        ids = await _ids(service, body)
        reply = {"count": len(ids), "max_model_len": service.info.max_model_len, "tokens": ids, "token_strs": None}
        if body.return_token_strs:
            tokenizer = service.voice(body.model).tokenizer
            reply["token_strs"] = [tokenizer.id_to_token(i) or "" for i in ids]
        return JSONResponse(reply)

    async def _ids(service: TextService, body: TokenizeRequest) -> list[int]:
        tokenizer = service.voice(body.model).tokenizer
        if body.prompt == "" and (body.add_special_tokens is False or not tokenizer.encode("")):
            return []
        chat = body.messages is not None
        opens = body.add_generation_prompt
        _, ids = await service.tokenize(
            GenerateInput(
                text=body.prompt,
                messages=body.messages,
                tools=[t.model_dump(exclude_unset=True) for t in body.tools] if chat and body.tools else None,
                add_special_tokens=body.add_special_tokens,
                add_generation_prompt=not body.continue_final_message if opens is None else opens,
                continue_final_message=bool(body.continue_final_message),
                chat_template_kwargs=body.chat_template_kwargs or {},
                model=body.model,
            )
        )
        return ids

    @router.post("/detokenize", response_model=DetokenizeReply, openapi_extra=takes(DetokenizeRequest))
    async def detokenize(body: Annotated[DetokenizeRequest, Depends(body_of(DetokenizeRequest))]) -> Response:
        service = served.of(body.model)
        if not body.tokens:
            service.resolve_model(body.model)
            return JSONResponse({"prompt": ""})
        with named(body.names()):
            return JSONResponse({"prompt": await service.detokenize(body.tokens, model=body.model)})

    @router.get("/tokenizer_info", response_model=TokenizerInfo)
    async def tokenizer_info(model: str | None = None) -> Response:
        """What evaluation harnesses ask before they send token ids; of an adapter, its own, where `model` is one."""
        service = served.of(model)
        voice = service.voice(model)
        tokenizer, template = voice.tokenizer, voice.chat_template

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
