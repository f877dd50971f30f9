"""A chat page in Streamlit, against a running server: `pip install streamlit openai`, then
`streamlit run examples/streamlit_app.py`.

JAXSERVE_URL says where the server is, JAXSERVE_API_KEY the key it asks for.
"""

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


st.title("jaxserve")
messages = st.session_state.setdefault("messages", [])
for message in messages:
    st.chat_message(message["role"]).write(message["content"])

if text := st.chat_input("Write a message"):
    messages.append({"role": "user", "content": text})
    st.chat_message("user").write(text)
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
