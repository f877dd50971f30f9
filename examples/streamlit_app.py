"""A chat page in Streamlit, against a running server: `pip install streamlit openai`, then
`streamlit run examples/streamlit_app.py`."""

import os

import streamlit as st
from openai import OpenAI

client = OpenAI(base_url=os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1"), api_key="none")

st.title("jaxserve")
messages = st.session_state.setdefault("messages", [])
for message in messages:
    st.chat_message(message["role"]).write(message["content"])

if text := st.chat_input("Write a message"):
    messages.append({"role": "user", "content": text})
    st.chat_message("user").write(text)
    stream = client.chat.completions.create(model="default", messages=messages, stream=True)
    answer = st.chat_message("assistant").write_stream(stream)
    messages.append({"role": "assistant", "content": answer})
