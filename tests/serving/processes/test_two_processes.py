"""The server as two processes of two CPU devices each: same tokens as one process, and what happens when one is killed
or frozen."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading

import grpc
import pytest

from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1 import inference_pb2_grpc
from proto.jaxserve.v1.sampling_pb2 import SamplingParams
from tests.tiny_checkpoint import write_tiny_checkpoint

# A machine that is busy with other tests may take long for a step; nothing here waits for a timeout.
FLAGS = (
    "--dtype", "float32", "--max-num-seqs", "2", "--max-num-batched-tokens", "32", "--max-model-len", "128",
    "--page-size", "8", "--kv-cache-memory", "2MB", "--no-progress", "--no-http", "--step-timeout", "120",
)  # fmt: skip


class Process:
    """A server process whose standard error is read as it comes."""

    module = "serving.launch"

    def __init__(self, *args):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
        self.popen = subprocess.Popen(
            [sys.executable, "-m", self.module, *args], stderr=subprocess.PIPE, text=True, env=env
        )
        self.text = ""
        self._lines = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.popen.stderr:
            self.text += line
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern):
        while (line := self._lines.get(timeout=280)) is not None:
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} never came:\n{self.text}")

    def status(self):
        status = self.popen.wait(120)
        self._reader.join(30)
        return status


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(the model, a folder of compiled programs that all servers of this file share)"""
    folder = tmp_path_factory.mktemp("processes")
    return write_tiny_checkpoint(folder / "model"), folder / "programs"


@contextlib.contextmanager
def pair(files, *flags, mesh="model=4", follower_flags=()):
    """Process 0 and process 1, started."""
    model, programs = files
    common = ("--model", str(model), "--compile-cache", str(programs), *FLAGS, "--mesh", mesh, "--cpu-devices", "2")
    common += ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", *flags)
    processes = [Process(*common, "--grpc-port", "0", "--process-id", "0")]
    try:
        processes.append(Process(*common, "--process-id", "1", *follower_flags))
        yield processes
    finally:
        for process in processes:
            process.popen.kill()
            process.popen.wait()


@contextlib.contextmanager
def stub(leader):
    port = leader.wait_for(r"ready at gRPC 127\.0\.0\.1:(\d+)")[1]
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield inference_pb2_grpc.InferenceStub(channel)


def request(prompt, tokens=24):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling_params=params)


def prompts():
    """More than run at once; the first three share two pages of their prompts."""
    shared = [(7 * i) % 250 + 2 for i in range(19)]
    return [[*shared, i + 2, i + 3] for i in range(3)] + [[11, 5, 200 + i] * (1 + 9 * i) for i in range(3)]


def answers(inference):
    def one(prompt):
        return [token for message in inference.Generate(request(prompt)) for token in message.token_ids]

    first = one(prompts()[0])  # alone, so that its pages are there to share
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        return [first, *pool.map(one, prompts()[1:])]


@pytest.fixture(scope="module")
def expected(files):
    """The answers of one process with one device."""
    model, programs = files
    alone = Process("--model", str(model), "--compile-cache", str(programs), *FLAGS, "--grpc-port", "0")
    try:
        with stub(alone) as inference:
            tokens = answers(inference)
    finally:
        alone.popen.kill()
        alone.popen.wait()
    assert all(len(answer) == 24 for answer in tokens) and len({tuple(answer) for answer in tokens}) == 6
    return tokens


@pytest.mark.parametrize(
    ("mesh", "flags"),
    [
        ("model=4", ()),  # weights cut across both processes
        # A replica in each; they share sizes out between them.
        pytest.param(
            "data=2,model=2",
            ("--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--kv-cache-memory", "4MB"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_same_tokens_as_one_process(files, expected, mesh, flags):
    """At first, and from pages that were evicted to the processes' host memory meanwhile."""
    with pair(files, *flags, "--kv-offload-gb", "0.01", mesh=mesh) as (leader, follower):
        with stub(leader) as inference:
            assert answers(inference) == expected
            crowd = [[(37 * i + 11 * j) % 250 + 2 for j in range(100)] for i in range(12)]  # more than all pages hold
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                list(pool.map(lambda prompt: list(inference.Generate(request(prompt, 2))), crowd))
            again = [list(inference.Generate(request(prompt))) for prompt in prompts()]
            assert [[token for message in messages for token in message.token_ids] for messages in again] == expected
            assert sum(message.usage.cached_tokens for messages in again for message in messages) > 50
        follower.popen.send_signal(signal.SIGTERM)  # a cluster tells every process; only process 0 acts on it
        follower.wait_for("waiting for process 0 to end")
        leader.popen.send_signal(signal.SIGTERM)
        assert (leader.status(), follower.status()) == (0, 0), leader.text + follower.text
    assert "was not cached" not in leader.text + follower.text


def load(inference):
    """Starts 6 long requests; their first tokens have come when it returns. Their outcomes come later."""
    first = threading.Semaphore(0)

    def one(prompt):
        try:
            for count, _ in enumerate(inference.Generate(request(prompt, 60))):
                if count == 0:
                    first.release()
            return "finished"
        except grpc.RpcError as error:
            return error.code()

    pool = concurrent.futures.ThreadPoolExecutor(6)
    outcomes = [pool.submit(one, prompt) for prompt in prompts()]
    for _ in range(2):  # two run at once
        assert first.acquire(timeout=120)
    return outcomes


def seen(outcomes):
    return {outcome.result(120) for outcome in outcomes}


def test_the_follower_is_killed_under_load(files):
    with pair(files) as (leader, follower), stub(leader) as inference:
        outcomes = load(inference)
        follower.popen.kill()
        assert seen(outcomes) <= {"finished", grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.INTERNAL in seen(outcomes), "somebody was in the middle of an answer"
        assert leader.status() == 1
        assert "error: process 1 is gone: its connection closed." in leader.text


def test_the_leader_is_killed_under_load(files):
    with pair(files) as (leader, follower), stub(leader) as inference:
        outcomes = load(inference)
        leader.popen.kill()
        assert seen(outcomes) <= {"finished", grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.UNAVAILABLE in seen(outcomes)
        # JAX's own watch aborts a process whose coordinator is gone; it may be faster than ours.
        assert follower.status() in (1, -signal.SIGABRT)
        assert re.search("error: process 0 is gone|another task died", follower.text)


def test_the_follower_is_frozen_under_load(files):
    """It is there, holds its connections, and does nothing: as a machine does whose network is gone."""
    with pair(files) as (leader, follower), stub(leader) as inference:
        outcomes = load(inference)
        follower.popen.send_signal(signal.SIGSTOP)
        assert seen(outcomes) <= {"finished", grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
        assert grpc.StatusCode.INTERNAL in seen(outcomes), "somebody was in the middle of an answer"
        assert leader.status() == 1
        assert "error: process 1 has been silent for" in leader.text


@pytest.mark.slow  # test_link.py has a leader that is silent
def test_the_leader_is_frozen_under_load(files):
    with pair(files) as (leader, follower), stub(leader) as inference:
        outcomes = load(inference)
        leader.popen.send_signal(signal.SIGSTOP)
        assert follower.status() == 1
        assert "error: process 0 has been silent for" in follower.text
        leader.popen.kill()  # as the launcher does when one of its processes ends; only then can clients know
        assert seen(outcomes) <= {"finished", grpc.StatusCode.UNAVAILABLE}


def test_other_flags_are_refused_before_anything_is_loaded(files):
    with pair(files, follower_flags=("--max-num-seqs", "3")) as (leader, follower):
        assert (leader.status(), follower.status()) == (1, 1)
        said = "error: process 1 has --max-num-seqs 3, process 0 has 2: start all with the same flags."
        assert said in leader.text and said in follower.text
        assert "loaded" not in leader.text + follower.text.replace("loading", "")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--coordinator", "somewhere"], "--coordinator is 'somewhere'; it must be HOST:PORT"),
        (["--coordinator", "host:1"], "needs --num-processes and --process-id"),
        (["--process-id", "1"], "need --coordinator"),
        (["--coordinator", "host:1", "--num-processes", "2", "--process-id", "2"], "it must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(flags, said):
    from serving.boot.flags.launch import parse
    from serving.processes.start import place_of
    from sharding.processes import find  # the server says the same, but takes seconds to start

    assert find(None) is None
    with pytest.raises(ValueError, match=re.escape(said)):
        place_of(parse(flags)[1])
