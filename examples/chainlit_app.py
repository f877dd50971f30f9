"""A chat page in Chainlit, against a running server: `pip install chainlit openai`, then
`chainlit run examples/chainlit_app.py`. Images may be attached, for models that read them.

JAXSERVE_URL says where the server is, JAXSERVE_API_KEY the key it asks for.
"""

import asyncio
import base64
import os
import pathlib

import chainlit as cl
from openai import AsyncOpenAI, OpenAIError

client = AsyncOpenAI(
    base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("JAXSERVE_API_KEY", "none"),
)


def turns() -> list:
    """The conversation as it is sent: messages with images as OpenAI's parts, their content in them."""
    found = cl.chat_context.to_openai()
    for turn, message in zip(found, cl.chat_context.get(), strict=True):
        images = [one for one in message.elements if (one.mime or "").startswith("image/") and one.path]
        if images:
            urls = (
                f"data:{one.mime};base64,{base64.b64encode(pathlib.Path(one.path).read_bytes()).decode()}"
                for one in images
            )
            parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            turn["content"] = [*parts, {"type": "text", "text": turn["content"]}]
    return found


@cl.on_message
async def answer(message: cl.Message) -> None:
    """Streams the model's answer to the conversation so far. Chainlit cancels this on Stop; leaving the `async with` closes the
    connection, and with it the server ends the request."""
    cl.user_session.set("task", asyncio.current_task())
    reply = cl.Message(content="")
    try:
        async with await client.chat.completions.create(model="default", messages=turns(), stream=True) as stream:
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    await reply.stream_token(chunk.choices[0].delta.content)
    except OpenAIError as error:
        await cl.ErrorMessage(content=str(error)).send()
    finally:
        cl.user_session.set("task", None)
    await reply.update()


@cl.on_chat_end
def closed() -> None:
    """The page is closed: nobody reads the answer any more."""
    task = cl.user_session.get("task")
    if task is not None:
        task.cancel()
