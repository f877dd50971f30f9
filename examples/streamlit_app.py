"""A chat page in Streamlit, against a running server: `pip install streamlit openai`, then
`streamlit run examples/streamlit_app.py`. Images may be attached, for models that read them.

JAXSERVE_URL says where the server is, JAXSERVE_API_KEY the key it asks for.
"""

import base64
import os

import streamlit as st
from openai import OpenAI, OpenAIError
from streamlit.runtime import exists, get_instance
from streamlit.runtime.scriptrunner import get_script_run_ctx

client = OpenAI(
    base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"),
    api_key=os.environ.get("JAXSERVE_API_KEY", "none"),
)


def is_open() -> bool:
    """Whether somebody still looks. Streamlit lets a script run on when its page is closed, for one that comes back."""
    context = get_script_run_ctx()
    return context is None or not exists() or get_instance().is_active_session(context.session_id)


def show(message) -> None:
    """One message as it was sent: text, or OpenAI's parts."""
    content = message["content"]
    with st.chat_message(message["role"]):
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                st.write(part["text"])
            else:
                st.image(part["image_url"]["url"], width=240)


def image(file) -> dict:
    """An attached file as OpenAI's part, its content in it."""
    content = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{file.type};base64,{content}"}}


st.title("jaxserve")
messages = st.session_state.setdefault("messages", [])
for message in messages:
    show(message)

if given := st.chat_input("Write a message", accept_file="multiple", file_type=["png", "jpg", "jpeg", "webp", "gif"]):
    images = [image(file) for file in given.files]
    messages.append(
        {"role": "user", "content": [*images, {"type": "text", "text": given.text}] if images else given.text}
    )
    show(messages[-1])
    place = st.chat_message("assistant").empty()
    answer = {"role": "assistant", "content": ""}
    try:
        # On Stop Streamlit ends this script where it writes. Leaving the `with` closes the connection, and with it the server
        # ends the request. What came until then stays in the conversation.
        with client.chat.completions.create(model="default", messages=messages, stream=True) as stream:
            messages.append(answer)
            for chunk in stream:
                if not is_open():
                    break
                if chunk.choices and chunk.choices[0].delta.content:
                    answer["content"] += chunk.choices[0].delta.content
                    place.write(answer["content"])
    except OpenAIError as error:
        place.error(str(error))
