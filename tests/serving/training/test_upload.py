"""A trained adapter into a running server."""

from __future__ import annotations

import http.server
import json
import threading
from pathlib import Path

import pytest

from serving.training.upload import serve_to


@pytest.fixture
def server():
    """Answers as the server does; what it was sent is in `seen`."""
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body, self.headers.get("Authorization")))
            refused = body["lora_path"].startswith("/elsewhere")
            reply = json.dumps({"error": {"message": "lora_path is not below the folder."}}) if refused else "Success"
            self.send_response(403 if refused else 200)
            self.end_headers()
            self.wfile.write(reply.encode())

        def log_message(self, *_):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", seen
    running.shutdown()
    running.server_close()


def test_what_a_server_is_asked(server):
    url, seen = server
    assert serve_to(f"{url}/v1/", "facts", Path("/adapters/facts"), "key") == "Success"
    body = {"lora_name": "facts", "lora_path": "/adapters/facts", "load_inplace": True}
    assert seen == [("/v1/load_lora_adapter", body, "Bearer key")]


def test_refusals_are_told_in_the_servers_words(server):
    with pytest.raises(ValueError, match=r"refused \(403\): lora_path is not below the folder"):
        serve_to(server[0], "facts", Path("/elsewhere/facts"))
    with pytest.raises(ValueError, match="could not be reached"):
        serve_to("http://127.0.0.1:9", "facts", Path("x"))
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        serve_to("localhost:8000", "facts", Path("x"))
