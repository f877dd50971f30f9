"""The real server process on the default model: one command, answers over gRPC and HTTP, nothing leaks."""

import concurrent.futures
import contextlib
import json
import pathlib
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import grpc
import pytest

from models.loading.default_model import default_model
from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1.sampling_pb2 import Choices, SamplingParams, StructuredOutputs

pytestmark = pytest.mark.real_model

# Few and small programs: what is tested here does not depend on their number.
SMALL = ["--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--max-model-len", "512", "--no-progress"]


@contextlib.contextmanager
def process(*args):
    """(the process, a function that reads its standard error up to a pattern)."""
    popen = subprocess.Popen(
        [sys.executable, "-m", "serving.launch", "--grpc-port", "0", *args], stderr=subprocess.PIPE, text=True
    )
    guard = threading.Timer(1800, popen.kill)  # nothing may outlive the tests
    guard.start()
    seen = []

    def read_to(pattern):
        for line in popen.stderr:
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(seen))

    try:
        yield popen, read_to
    finally:
        guard.cancel()
        popen.kill()
        popen.wait()
        popen.stderr.close()


class Server:
    def __init__(self, popen, grpc_port, http_port):
        self.popen, self.http = popen, f"http://127.0.0.1:{http_port}"
        self.target = f"127.0.0.1:{grpc_port}"
        self.channel = grpc.insecure_channel(self.target)
        self.inference = inference_pb2_grpc.InferenceStub(self.channel)
        self.control = control_pb2_grpc.ControlStub(self.channel)

    def info(self):
        return self.control.GetServerInfo(control_pb2.GetServerInfoRequest())

    def ask(self, prompt, **params):
        params.setdefault("temperature", 0)
        params.setdefault("max_tokens", 16)
        return "".join(m.text for m in self.inference.Generate(request(prompt, **params)))

    def until_idle(self):
        for _ in range(500):
            info = self.info()
            if not info.num_running and not info.num_waiting and info.num_pages_free == info.num_pages_total:
                return
            time.sleep(0.02)
        raise AssertionError(f"pages or requests leaked: {info}")


def request(prompt, **params):
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=prompt)])
    return pb.GenerateRequest(chat=chat, sampling_params=SamplingParams(**params))


@pytest.fixture(scope="module")
def server():
    with process("--port", "0", "--dtype", "float32", *SMALL) as (popen, read_to):
        ready = read_to(r"ready at gRPC 127\.0\.0\.1:(\d+), http://127\.0\.0\.1:(\d+)")
        # Keep reading, or the process stops when the pipe is full.
        threading.Thread(target=popen.stderr.read, daemon=True).start()
        server = Server(popen, ready[1], ready[2])
        yield server
        server.channel.close()


def test_a_sensible_answer(server):
    assert "Paris" in server.ask("What is the capital of France?")


def test_the_same_over_http(server):
    body = {"model": "default", "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    post = urllib.request.Request(
        server.http + "/v1/chat/completions",
        json.dumps({**body, "temperature": 0, "max_tokens": 16}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(post, timeout=60) as reply:
        text = json.load(reply)["choices"][0]["message"]["content"]
    assert text == server.ask("What is the capital of France?")


def test_the_model_is_itself(server):
    info = server.control.GetModelInfo(control_pb2.GetModelInfoRequest())
    assert info.id == "SmolLM2-135M-Instruct" and "default" in info.names
    assert (info.max_model_len, info.has_chat_template, list(info.eos_token_ids)[:1]) == (512, True, [2])


QUESTIONS = [f"Say the number {i} and {'a word ' * (i % 5)}" for i in range(6)]


def test_answers_do_not_depend_on_what_else_runs(server):
    alone = [server.ask(q, max_tokens=4 + i) for i, q in enumerate(QUESTIONS)]
    with concurrent.futures.ThreadPoolExecutor(len(QUESTIONS)) as pool:
        together = list(pool.map(lambda i: server.ask(QUESTIONS[i], max_tokens=4 + i), range(len(QUESTIONS))))
    assert together == alone


def test_text_and_its_tokens_and_back(server):
    text = "naïve 東京 🎌 2026"
    ids = server.inference.Tokenize(pb.TokenizeRequest(text=text)).token_ids
    assert server.inference.Detokenize(pb.DetokenizeRequest(token_ids=ids)).text == text
    by_text = server.inference.Generate(pb.GenerateRequest(text=text, sampling_params=SamplingParams(max_tokens=1)))
    assert list(by_text)[-1].usage.prompt_tokens == len(ids)


def test_same_seed_same_text_in_any_company(server):
    params = {"temperature": 1.0, "seed": 7, "max_tokens": 12}
    alone = server.ask("Tell me a story", **params)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda _: server.ask("Tell me a story", **params), range(4)))
    assert texts == [alone] * 4
    assert server.ask("Tell me a story", **{**params, "seed": 8}) != alone


def test_structured_output_and_stop_strings(server):
    choice = StructuredOutputs(choice=Choices(choices=["purple", "orange"]))
    assert server.ask("Pick a colour", structured_outputs=choice) in ("purple", "orange")
    assert server.ask("What is the capital of France?", stop=["is Par"]) == "The capital of France "


def test_every_option_without_a_compilation(server):
    for params in (
        {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "min_p": 0.05, "seed": 1},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.5},
        {"logit_bias": {5: 3.0}, "bad_words": ["the"], "min_tokens": 3},
        {"allowed_token_ids": [10, 11, 12], "ignore_eos": True},
        {"logprobs": 5, "prompt_logprobs": 2},
        {"n": 3, "temperature": 1.0},
    ):
        server.ask("Hello there", max_tokens=5, **params)
    server.ask("long " * 150, max_tokens=2)
    assert server.info().num_recompilations == 0


def test_a_dropped_call_frees_its_pages(server):
    calls = [server.inference.Generate(request("Tell me a story", max_tokens=400, ignore_eos=True)) for _ in range(6)]
    for call in calls[:2]:
        next(call)
    for call in calls:
        call.cancel()
    server.until_idle()


def test_a_passed_deadline_frees_its_pages(server):
    call = server.inference.Generate(request("Tell me a story", max_tokens=400, ignore_eos=True), timeout=0.5)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    server.until_idle()


def test_bad_input_is_refused_and_the_server_goes_on(server):
    for bad in (
        pb.GenerateRequest(text=""),
        request("x " * 600),
        request("x", max_tokens=0),
        request("x", max_tokens=10**9),
        request("x", temperature=float("nan")),
        request("x", n=10**9),
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[10**6])),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            list(server.inference.Generate(bad))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value.details()
    assert "Paris" in server.ask("What is the capital of France?")
    server.until_idle()


def test_the_terminal_chat(server):
    command = [
        sys.executable,
        "-m",
        "serving.chat",
        "--target",
        server.target,
        "--temperature",
        "0",
        "--max-tokens",
        "16",
    ]
    result = subprocess.run(
        command, input="What is the capital of France?\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0 and "Paris" in result.stdout


def test_sigterm_finishes_what_runs(server):
    """Last: it ends the server."""
    call = server.inference.Generate(request("Tell me a story", max_tokens=24, ignore_eos=True))
    first = next(call)
    server.popen.send_signal(signal.SIGTERM)
    messages = [first, *call]
    assert messages[-1].usage.completion_tokens == 24
    assert server.popen.wait(60) == 0


def _truncated_gguf(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "cut.gguf"
    with default_model().open("rb") as source:
        path.write_bytes(source.read(3_000_000))
    return path


def _lying_safetensors(folder: pathlib.Path) -> pathlib.Path:
    """A header that promises more than the file has."""
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 128, "rope_theta": 10000.0, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header = {"model.embed_tokens.weight": {"dtype": "F32", "shape": [256, 64], "data_offsets": [0, 1 << 40]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(1000))
    return folder


@pytest.mark.parametrize("damage", [_truncated_gguf, _lying_safetensors])
def test_a_damaged_checkpoint_is_an_error_in_words(tmp_path, damage):
    with process("--model", str(damage(tmp_path)), "--no-http", *SMALL) as (popen, read_to):
        said = read_to("error: (.*)")[1]
        rest = popen.stderr.read()
        assert popen.wait(60) == 1
    assert len(said) > 20 and "Traceback" not in rest
