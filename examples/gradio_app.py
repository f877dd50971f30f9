"""A chat page in Gradio, against a running server: `pip install gradio openai`, then `python examples/gradio_app.py`. Images may be
attached, for models that read them.

JAXSERVE_URL says where the server is, JAXSERVE_API_KEY the key it asks for.
"""

import base64
import mimetypes
import os
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr
from openai import AsyncOpenAI, OpenAIError

client = AsyncOpenAI(
    base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("JAXSERVE_API_KEY", "none"),
)


def image(path: str) -> dict[str, Any]:
    """A file as OpenAI's part, its content in it."""
    kind = mimetypes.guess_type(path)[0] or "image/png"
    content = base64.b64encode(pathlib.Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{content}"}}


def parts_of(content: Any) -> Any:
    """A turn as it is sent: Gradio keeps it plainly, or in parts, of which files have a path."""
    if isinstance(content, str):
        return content
    parts: list[dict[str, Any]] = []
    for part in content:
        path = part.get("path") or part.get("file", {}).get("path")
        parts.append(image(path) if path else {"type": "text", "text": part.get("text", "")})
    text_alone = all(part["type"] == "text" for part in parts)
    return "".join(part["text"] for part in parts) if text_alone else parts


async def answer(message: dict[str, Any], history: list[dict[str, Any]]) -> AsyncIterator[str]:
    """Streams the answer. Gradio closes this generator on Stop and when the page is closed; leaving the `async with` closes the
    connection, and with it the server ends the request."""
    turns = [{"role": turn["role"], "content": parts_of(turn["content"])} for turn in history]
    new = [*({"path": path} for path in message["files"]), {"text": message["text"]}]
    turns.append({"role": "user", "content": parts_of(new)})
    text = ""
    try:
        async with await client.chat.completions.create(model="default", messages=turns, stream=True) as stream:  # type: ignore[arg-type]
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    text += chunk.choices[0].delta.content
                    yield text
    except OpenAIError as error:
        raise gr.Error(str(error)) from None


box = gr.MultimodalTextbox(file_types=["image"], file_count="multiple", placeholder="Write a message")
demo = gr.ChatInterface(answer, multimodal=True, textbox=box, title="jaxserve", api_name="chat")

if __name__ == "__main__":
    demo.launch()
