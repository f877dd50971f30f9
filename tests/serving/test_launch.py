"""The server process: flags, start-up, signals, exit status. A mock engine stands behind it."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import inference_pb2_grpc
from serving.boot.flags import launch as flags

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "mock_launch.py"


class Process:
    """A server process whose standard error is read as it comes."""

    def __init__(self, *args, options=None):
        self.popen = subprocess.Popen(
            [sys.executable, SCRIPT, *args],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MOCK_LAUNCH": json.dumps(options or {})},
        )
        self.lines = []

    def wait_for(self, pattern):
        for line in self.popen.stderr:
            self.lines.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} never came:\n{self.text}")

    def end(self):
        """(exit status, what it still said)."""
        rest = self.popen.stderr.read()
        return self.popen.wait(120), rest

    @property
    def text(self):
        return "".join(self.lines)


@contextlib.contextmanager
def launched(*args, **options):
    process = Process("--grpc-port", "0", *args, options=options)
    guard = threading.Timer(240, process.popen.kill)  # a hanging server must not hang the tests
    guard.start()
    try:
        yield process
    finally:
        guard.cancel()
        process.popen.kill()
        process.popen.wait()
        process.popen.stderr.close()


def stub(port):
    channel = grpc.insecure_channel(f"127.0.0.1:{port}")
    return channel, inference_pb2_grpc.InferenceStub(channel)


def test_starts_serves_drains_and_stops():
    with launched("--port", "0", "--served-model-name", "fancy", "plain", reply="word " * 20, step_s=0.005) as server:
        ready = server.wait_for(r"ready at gRPC 127\.0\.0\.1:(\d+), http://127\.0\.0\.1:(\d+)")
        assert "loaded the mock" in server.text and "serving fancy" in server.text
        assert server.text.startswith("given: --grpc-port 0, --port 0, --served-model-name fancy plain\n")
        with urllib.request.urlopen(f"http://127.0.0.1:{ready[2]}/v1/models", timeout=60) as reply:
            assert "fancy" in reply.read().decode()
        channel, inference = stub(ready[1])
        running = inference.Generate(pb.GenerateRequest(text="x", model="plain"))
        first = next(running).text
        server.popen.send_signal(signal.SIGTERM)
        server.wait_for("SIGTERM: refusing new requests")
        with pytest.raises(grpc.RpcError) as caught:
            next(inference.Generate(pb.GenerateRequest(text="x")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert first + "".join(m.text for m in running) == "word " * 20, "what ran went on to its end"
        status, rest = server.end()
        channel.close()
    assert status == 0 and "engine shut down" in rest and "stopped" in rest


def test_the_second_signal_stops_at_once():
    with launched("--no-http", "--drain-timeout", "1000", reply="word " * 700, step_s=0.05) as server:
        port = server.wait_for(r"ready at gRPC 127\.0\.0\.1:(\d+)")[1]
        channel, inference = stub(port)
        running = inference.Generate(pb.GenerateRequest(text="x"))
        next(running)
        server.popen.send_signal(signal.SIGTERM)
        server.wait_for("1 running")
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(grpc.RpcError) as cut:
            list(running)
        assert cut.value.code() is grpc.StatusCode.UNAVAILABLE
        status, _ = server.end()
        channel.close()
    assert status == 128 + signal.SIGTERM


def test_requests_still_running_after_the_drain_timeout_are_ended():
    with launched("--no-http", "--drain-timeout", "0.2", reply="word " * 700, step_s=0.05) as server:
        port = server.wait_for(r"ready at gRPC 127\.0\.0\.1:(\d+)")[1]
        channel, inference = stub(port)
        running = inference.Generate(pb.GenerateRequest(text="x"))
        next(running)
        server.popen.send_signal(signal.SIGINT)
        with pytest.raises(grpc.RpcError):
            list(running)
        status, rest = server.end()
        channel.close()
    assert status == 0 and "ending 1 requests" in rest


STREAMS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
}


def ask(url, path, stream):
    """A reply whose head and, where it is a stream, first event have come."""
    most = "max_output_tokens" if "responses" in path else "max_tokens"
    body = json.dumps({**STREAMS[path], most: 3000, "stream": stream}).encode()
    request = urllib.request.Request(url + path, body, {"Content-Type": "application/json"})
    reply = urllib.request.urlopen(request, timeout=200)
    return reply, reply.readline()


def cut_reply(url, path):
    """Status and error of a reply that is no stream."""
    with pytest.raises(urllib.error.HTTPError) as cut:
        ask(url, path, stream=False)
    return cut.value.code, json.load(cut.value)["error"]


@pytest.mark.parametrize("how", ["drain timeout", "second signal"])
def test_what_a_stop_cuts_says_so_on_every_protocol(how):
    """No answer ends as if it were whole: an event in streams, a status elsewhere; and nothing breaks with a traceback."""
    drain = "0.3" if how == "drain timeout" else "1000"
    with launched("--port", "0", "--drain-timeout", drain, reply="word " * 700, step_s=0.02) as server:
        ready = server.wait_for(r"ready at gRPC 127\.0\.0\.1:(\d+), (http://\S+)")
        url = ready[2]
        channel, inference = stub(ready[1])
        running = inference.Generate(pb.GenerateRequest(text="x"))
        next(running)
        streams = {path: ask(url, path, stream=True)[0] for path in STREAMS}
        with concurrent.futures.ThreadPoolExecutor() as threads:
            whole = {path: threads.submit(cut_reply, url, path) for path in STREAMS}
            deadline = time.monotonic() + 120
            while json.load(urllib.request.urlopen(f"{url}/load", timeout=60))["server_load"] < 7:
                assert time.monotonic() < deadline, "seven requests run"
            server.popen.send_signal(signal.SIGTERM)
            if how == "second signal":
                server.wait_for("7 running")
                server.popen.send_signal(signal.SIGTERM)
            ends = {path: reply.read().decode() for path, reply in streams.items()}
            codes = {path: reply.result() for path, reply in whole.items()}
        with pytest.raises(grpc.RpcError) as cut:
            list(running)
        status, rest = server.end()
        channel.close()
    assert cut.value.code() is grpc.StatusCode.UNAVAILABLE and "shutting down" in cut.value.details()
    for path, text in ends.items():
        events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
        last = json.loads([event for event in events if event != "[DONE]"][-1])
        error = last["response"]["error"] if path == "/v1/responses" else last["error"]
        code = (
            "server_error" if path == "/v1/responses" else "server_shutting_down"
        )  # the former is of OpenAI's closed list
        assert error["code"] == code and "ask another replica" in error["message"], (path, last)
        assert '"finish_reason":"' not in text and "response.completed" not in text, path
    for path, (code, error) in codes.items():
        assert code == 503 and error["code"] == "server_shutting_down", (path, error)
    assert "Traceback" not in rest and "ERROR" not in rest, rest
    assert status == (0 if how == "drain timeout" else 128 + signal.SIGTERM)


def test_a_dead_engine_ends_the_process_with_a_failure():
    with launched("--no-http", die_after_s=0.5) as server:
        server.wait_for("ready at")
        status, rest = server.end()
    assert status == 1 and "the engine died" in rest


def test_a_signal_while_loading_ends_it_at_once():
    with launched("--no-http", start_s=1000) as server:
        server.wait_for("listening for gRPC")
        server.popen.send_signal(signal.SIGTERM)
        status, rest = server.end()
    assert status == 128 + signal.SIGTERM and "before it was ready" in rest


def test_health_says_not_ready_while_loading():
    with launched("--no-http", start_s=1000) as server:
        port = server.wait_for(r"listening for gRPC on 127\.0\.0\.1:(\d+)")[1]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check
            assert check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
            ready = check(health_pb2.HealthCheckRequest(service="jaxserve.v1.Inference")).status
            assert ready == health_pb2.HealthCheckResponse.NOT_SERVING


def test_what_cannot_be_served_is_told_in_a_sentence():
    with launched("--no-http", fail="the checkpoint has no tensor 'x'.") as server:
        status, rest = server.end()
    assert status == 1 and "error: the checkpoint has no tensor 'x'." in rest and "Traceback" not in rest


def test_what_cannot_be_served_names_flags():
    with launched("--no-http", fail="max_num_seqs is 3; lower kv_cache_memory.") as server:
        _, rest = server.end()
    assert "error: --max-num-seqs is 3; lower --kv-cache-memory." in rest


def test_a_taken_grpc_port_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with launched("--no-http", "--grpc-port", str(taken.getsockname()[1]), start_s=1000) as server:
            status, rest = server.end()
    assert status == 1 and "--grpc-port" in rest and "Traceback" not in rest


def test_a_taken_http_port_that_was_asked_for_is_told_before_the_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with launched("--port", str(taken.getsockname()[1]), start_s=1000) as server:
            status, rest = server.end()
    assert status == 1 and "--port" in rest and "Traceback" not in rest


def test_the_last_line_says_what_to_open():
    with launched("--port", "0") as server:
        url = server.wait_for(r"ready at gRPC \S+, (http://\S+)")[1]
        assert server.wait_for(r"open (\S+)/ in a browser; clients of OpenAI's API use (\S+)/v1$").groups() == (
            url,
            url,
        )


# -- flags ---------------------------------------------------------------------------------------------------------------


def test_defaults():
    args, config = flags.parse([])
    assert (args.host, args.grpc_port, args.drain_timeout) == ("127.0.0.1", 50051, 30.0)
    assert config == type(config)()


MANY = """
    --model m.gguf --dtype float32 --max-model-len 2048 --max-num-seqs 8 --max-num-batched-tokens 256 --page-size 32
    --kv-cache-memory 1.5GiB --seed 7 --mesh data=1,model=2 --cpu-devices 2 --scheduling-policy priority
    --no-enable-prefix-caching --no-async-scheduling --quantization none --max-num-queued-reqs 9 --no-progress
"""


def test_flags_reach_the_configuration():
    _, config = flags.parse(MANY.split())
    assert (config.model, config.dtype, config.quantization) == ("m.gguf", "float32", "none")
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (2048, 8, 256)
    assert (config.page_size, config.kv_cache_memory, config.seed) == (32, 1610612736, 7)
    assert (config.mesh, config.cpu_devices, config.policy) == ("data=1,model=2", 2, "priority")
    assert not (config.enable_prefix_caching or config.async_scheduling or config.progress)
    assert config.max_num_queued_reqs == 9


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("--grpc-prot 1", "there is no flag --grpc-prot; did you mean --grpc-port?"),
        ("--max_model_len 9", "did you mean --max-model-len?"),
        ("--tensor-parallel-size 2", "--mesh data=1,model=N"),
        ("--zzz", "there is no flag --zzz."),
        ("--port x", "--port takes a port from 0 to 65535, got 'x'"),
        ("--port 70000", "--port"),
        ("--max-num-seqs 0", "at least 1"),
        ("--page-size 10", "--page-size must be a power of two"),
        ("--kv-cache-memory much", "4GiB"),
        ("--drain-timeout -1", "seconds"),
        ("--dtype float8", "choose from"),
        ("stray", "'stray' belongs to no flag"),
        ("--tool-call-parser nope", "There is no tool-call parser named 'nope'"),
        ("--reasoning-parser nope", "There is no reasoning parser named 'nope'"),
    ],
)
def test_wrong_flags_are_explained(given, sentence, capsys):
    with pytest.raises(SystemExit) as caught:
        flags.parse(given.split())
    said = capsys.readouterr().err
    assert caught.value.code == 2 and sentence in said and len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("4GiB", 4 << 30), ("500MB", 500_000_000), ("1.5g", 3 << 29), ("2 kb", 2000)]
)
def test_sizes(text, size):
    assert flags.parse(["--kv-cache-memory", text])[1].kv_cache_memory == size


def test_every_flag_has_a_meaning_and_shows_its_default():
    text = flags.build_parser().format_help()
    for action in flags.build_parser()._actions:
        assert action.help, action.option_strings
    described = "".join(text.split())
    assert "(default:50051)" in described and "(default:data=1,model=1)" in described
