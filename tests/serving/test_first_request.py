"""What a first request would otherwise pay for has been paid before the server says that it is ready."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request

import grpc

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from serving import memory
from tests.tiny_checkpoint import write_tiny_checkpoint

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}w3"


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read().decode()


def test_first_requests_import_and_compile_nothing(tmp_path):
    model = write_tiny_checkpoint(tmp_path / "model")
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tests.serving.first_request_run", "--model", str(model), "--grpc-port", "0", "--port", "0",
            "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--max-model-len", "64", "--no-progress",
            "--chat-template", TEMPLATE, "--compile-cache", str(tmp_path / "programs"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    guard = threading.Timer(300, process.kill)
    guard.start()
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"ready at gRPC (\S+), (http\S+)", line):
                break
        else:
            raise AssertionError("".join(said))
        assert not [line for line in said if line.startswith(("LATE", "DEAR"))]
        with grpc.insecure_channel(found[1]) as channel:
            info = control_pb2_grpc.ControlStub(channel).GetServerInfo(control_pb2.GetServerInfoRequest())
            assert (info.num_steps, info.prompt_tokens, info.prefix_queries) == (0, 0, 0)
            assert info.num_pages_free == info.num_pages_total
            chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="w4 w5")])
            params = pb.GenerateRequest(chat=chat).sampling_params
            params.max_tokens, params.temperature, params.top_p, params.frequency_penalty = 4, 0.7, 0.9, 0.5
            messages = inference_pb2_grpc.InferenceStub(channel).Generate(
                pb.GenerateRequest(chat=chat, sampling_params=params)
            )
            assert list(messages)[-1].usage.prompt_tokens == 3
            chat = {"messages": [{"role": "user", "content": "w4 w5"}], "max_tokens": 4}
            assert json.loads(post(f"{found[2]}/v1/chat/completions", chat))["usage"]["prompt_tokens"] == 3
            assert "data: [DONE]" in post(f"{found[2]}/v1/chat/completions", chat | {"stream": True})
            assert "data: [DONE]" in post(
                f"{found[2]}/v1/completions", {"prompt": "w6", "max_tokens": 2, "stream": True}
            )
            info = control_pb2_grpc.ControlStub(channel).GetServerInfo(control_pb2.GetServerInfoRequest())
            assert info.num_recompilations == 0
        process.send_signal(signal.SIGTERM)
        late = [line for line in process.stderr if line.startswith("LATE")]
        assert not late, late
    finally:
        guard.cancel()
        process.kill()
        process.wait()
        process.stderr.close()


def test_a_started_server_collects_only_what_came_later():
    code = """
import gc
from serving import memory
before = gc.get_threshold()
memory.begin_start()
assert gc.get_threshold()[0] == memory.YOUNG_OBJECTS and gc.isenabled()
import json
memory.end_start()
assert gc.get_threshold() == before
assert gc.get_freeze_count() > 1000 and len(gc.get_objects()) < 1000
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_giving_memory_back_is_harmless():
    found = memory.give_back()
    assert found in (0, 1) if os.confstr_names.get("CS_GNU_LIBC_VERSION") else found is None
    assert gc.get_freeze_count() == 0, "this process is not ours alone"
