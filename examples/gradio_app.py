"""A chat page in Gradio, against a running server: `pip install gradio openai`, then `python examples/gradio_app.py`."""

import os

import gradio as gr

URL = os.environ.get("JAXSERVE_URL", "http://127.0.0.1:8000/v1")

# load_chat streams, keeps the conversation, and sends it whole each turn. The server takes text, no files.
demo = gr.load_chat(URL, model="default", token="none", file_types=None, title="jaxserve")

if __name__ == "__main__":
    demo.launch()
