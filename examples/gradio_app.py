"""A chat page in Gradio, against a running server: `pip install gradio openai`, then `python examples/gradio_app.py`.

JAXSERVE_URL says where the server is, JAXSERVE_API_KEY the key it asks for.
"""

import os
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from openai import AsyncOpenAI, OpenAIError

client = AsyncOpenAI(
    base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("JAXSERVE_API_KEY", "none"),
)


def text_of(content: Any) -> str:
    """A turn's text: Gradio keeps it plainly, or in parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


async def answer(message: str, history: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Streams the answer. Gradio closes this generator on Stop and when the page is closed; leaving the `async with` closes the
    connection, and with it the server ends the request."""
    turns = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
    turns.append({"role": "user", "content": message})
    text = ""
    try:
        async with await client.chat.completions.create(model="default", messages=turns, stream=True) as stream:  # type: ignore[arg-type]
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    yield text
    except OpenAIError as error:
        raise gr.Error(str(error)) from None


demo = gr.ChatInterface(answer, title="jaxserve", api_name="chat")

if __name__ == "__main__":
    demo.launch()
