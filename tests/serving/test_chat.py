"""The terminal chat against a real gRPC server with a mock engine."""

import asyncio
import contextlib
import io
import threading

import grpc
import pytest

from proto.jaxserve.v1.sampling_pb2 import SamplingParams
from serving import chat as chat_module
from serving.access import Access, KeyRing, ServerTls
from serving.chat import Chat, loop
from serving.frontends.grpc.server import GrpcServer
from tests.mock_engine import MockEngine, mock_service, until
from tests.serving.access import certificates


@contextlib.contextmanager
def server(engine, access=None, tls=None, **options):
    """A server in a thread of its own: the chat blocks."""
    events = asyncio.new_event_loop()
    thread = threading.Thread(target=events.run_forever, daemon=True)
    thread.start()

    async def start():
        grpc_server = GrpcServer("127.0.0.1", 0, access=access, tls=tls)
        await grpc_server.start()
        await grpc_server.serve(mock_service(engine, **options))
        return grpc_server

    running = asyncio.run_coroutine_threadsafe(start(), events).result(120)
    try:
        yield f"127.0.0.1:{running.port}", lambda work: asyncio.run_coroutine_threadsafe(work, events).result(120)
    finally:
        asyncio.run_coroutine_threadsafe(running.stop(), events).result(120)
        events.call_soon_threadsafe(events.stop)
        thread.join(10)
        events.close()


def typed(*lines):
    """`input` for a person who types these lines, then Ctrl-D. A KeyboardInterrupt among them is Ctrl-C."""
    left = iter(lines)

    def read(prompt):
        line = next(left, None)
        if line is None:
            raise EOFError
        if line is KeyboardInterrupt:
            raise KeyboardInterrupt
        return line

    return read


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def test_thinking_is_shown_on_terminals_and_not_remembered():
    with (
        server(MockEngine("<think>hm</think>Yes."), reasoning_parser="think") as (target, _),
        grpc.insecure_channel(target) as channel,
    ):
        for out, shown in ((io.StringIO(), "Yes.\n"), (_Terminal(), "\x1b[2mhm\x1b[0mYes.\n")):
            chat = Chat(channel, SamplingParams(), out=out)
            chat.ask("Really?")
            assert out.getvalue().replace("\x1b[0m\x1b[2m", "") == shown
            assert chat.turns[-1].content == "Yes."


def test_a_conversation_is_remembered_until_it_is_cleared():
    engine = MockEngine("sure")
    with server(engine) as (target, _), grpc.insecure_channel(target) as channel:
        out = io.StringIO()
        chat = Chat(channel, SamplingParams(), "be kind", out=out)
        loop(chat, typed("one", "", "two", "/clear", "/system short", "three", "/help"), interactive=False)
    assert out.getvalue() == "sure\n" * 3
    prompts = [bytes(i for i in r.prompt_token_ids if i < 256).decode() for r in engine.requests]
    assert prompts == ["be kindone", "be kindonesuretwo", "shortthree"]


class Interrupting(io.StringIO):
    """Ctrl-C comes after so many pieces."""

    def __init__(self, after):
        super().__init__()
        self.left = after

    def write(self, text):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(capsys):
    engine = MockEngine("word ", step_s=0.002, max_model_len=100_000)
    with server(engine) as (target, run), grpc.insecure_channel(target) as channel:
        chat = Chat(channel, SamplingParams(ignore_eos=True), out=Interrupting(8))
        assert chat.ask("go") is None
        run(until(lambda: not engine.live, "the server aborted the request"))
        assert chat.turns[1].content.startswith("word"), "what came is part of the conversation"
        chat = Chat(channel, SamplingParams(max_tokens=4), out=io.StringIO())
        loop(chat, typed(KeyboardInterrupt, "again"), interactive=True)
        assert chat.turns[-1].content == "word"
    assert "/quit" in capsys.readouterr().out


def test_a_refused_question_is_told_and_forgotten(capsys):
    with server(MockEngine("ok", max_model_len=64)) as (target, _), grpc.insecure_channel(target) as channel:
        chat = Chat(channel, SamplingParams(), out=io.StringIO())
        loop(chat, typed("x" * 100, "hi"), interactive=False)
        assert [turn.content for turn in chat.turns] == ["hi", "ok"]
    assert "reduce the length of the messages" in capsys.readouterr().err


def test_main_reads_standard_input(monkeypatch, capsys):
    with server(MockEngine("fine")) as (target, _):
        monkeypatch.setattr("sys.stdin", io.StringIO("how are you?\n"))
        assert chat_module.main(["--target", target, "--temperature", "0"]) == 0
    assert "fine" in capsys.readouterr().out


def test_without_a_server_it_says_how_to_start_one(capsys):
    assert chat_module.main(["--target", "127.0.0.1:1"]) == 1
    assert "python -m serving.launch" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nope"])
def test_an_unknown_model_is_told(capsys, model):
    with server(MockEngine("fine")) as (target, _):
        assert chat_module.main(["--target", target, "--model", model]) == 1
    assert "does not exist" in capsys.readouterr().err


KEY = "sk-0123456789abcdef"


def test_keys_and_tls(tmp_path, monkeypatch, capsys):
    certificates.make(tmp_path)
    file = {name: str(tmp_path / name) for name in ("ca.pem", "server.key", "server.pem", "client.key", "client.pem")}
    tls = ServerTls(file["server.key"], file["server.pem"], file["ca.pem"], "required")
    ours = ["--ssl-keyfile", file["client.key"], "--ssl-certfile", file["client.pem"], "--ssl-ca-certs", file["ca.pem"]]

    def asked(*flags):
        monkeypatch.setattr("sys.stdin", io.StringIO("how are you?\n"))
        status = chat_module.main(["--target", target, *flags])
        return status, capsys.readouterr()

    with server(MockEngine("fine"), access=Access(KeyRing.of([KEY])), tls=tls) as (target, _):
        status, said = asked("--api-key", KEY, *ours)
        assert status == 0 and said.out == "fine\n"
        status, said = asked(*ours)
        assert status == 1 and "--api-key" in said.err and "JAXSERVE_API_KEY" in said.err
        status, said = asked("--api-key", KEY)
        assert status == 1 and "--tls" in said.err
        monkeypatch.setenv("JAXSERVE_API_KEY", KEY)
        assert asked(*ours)[0] == 0
        status, said = asked("--ssl-ca-certs", str(tmp_path / "nothing.pem"))
        assert status == 1 and "nothing.pem" in said.err and "Traceback" not in said.err


def test_a_server_that_is_lost_is_told_in_words(capsys):
    engine = MockEngine("word ", step_s=0.01, max_model_len=100_000)
    with server(engine) as (target, _), grpc.insecure_channel(target) as channel:

        class Out(io.StringIO):
            def write(self, text):
                if self.getvalue() == "":
                    engine.die()
                return super().write(text)

        chat = Chat(channel, SamplingParams(ignore_eos=True), out=Out())
        loop(chat, typed("go"), interactive=False)
        assert chat.turns == []
    assert "error: " in capsys.readouterr().err
