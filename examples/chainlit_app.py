"""A chat page in Chainlit, against a running server: `pip install chainlit openai`, then
`chainlit run examples/chainlit_app.py`."""

import os

import chainlit as cl
from openai import AsyncOpenAI

client = AsyncOpenAI(base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"), api_key="none")


@cl.on_message
async def answer(message: cl.Message) -> None:
    """Streams the model's answer to the conversation so far."""
    reply = cl.Message(content="")
    stream = await client.chat.completions.create(model="default", messages=cl.chat_context.to_openai(), stream=True)
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            await reply.stream_token(chunk.choices[0].delta.content)
    await reply.update()
