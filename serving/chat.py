"""python -m serving.chat: a chat in the terminal, over gRPC. Ctrl-C stops the answer, not the program."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TextIO

import grpc

from proto.jaxserve.v1 import control_pb2, control_pb2_grpc, inference_pb2_grpc
from proto.jaxserve.v1 import inference_pb2 as pb
from proto.jaxserve.v1.sampling_pb2 import SamplingParams
from serving.access import ClientTls
from serving.access.flags import KEY_VARIABLE
from serving.frontends.grpc.errors import LOST, error_of

DIM, PLAIN = "\x1b[2m", "\x1b[0m"  # ECMA-48: a model's thinking is shown faint, and on terminals alone
HELP = "/clear forgets the conversation, /system TEXT sets the system prompt, /quit or Ctrl-D leaves."


class Chat:
    """A conversation with one server.

    Args:
        channel: to the server.
        params: sampling parameters of every answer.
        system: system prompt, or None.
        out: where answers go; standard output without.
        api_key: sent with every question, for servers that ask for one.
    """

    def __init__(
        self,
        channel: grpc.Channel,
        params: SamplingParams,
        system: str | None = None,
        model: str = "",
        out: TextIO | None = None,
        api_key: str | None = None,
    ) -> None:
        self._inference = inference_pb2_grpc.InferenceStub(channel)
        self._params = params
        self._model = model
        self._out = out or sys.stdout
        self._metadata = key_metadata(api_key)
        self.turns: list[pb.ChatMessage] = []
        self.system = system

    def clear(self) -> None:
        """Forgets the conversation; the system prompt stays."""
        self.turns = []

    def ask(self, text: str) -> pb.Usage | None:
        """Streams the answer to `text` and remembers both.

        Returns:
            tokens and times, or None when Ctrl-C stopped the answer; what came until then is remembered.
        Raises:
            grpc.RpcError: the server's refusal; the question is then forgotten.
        """
        question = pb.ChatMessage(role="user", content=text)
        system = [pb.ChatMessage(role="system", content=self.system)] if self.system else []
        call = self._inference.Generate(
            pb.GenerateRequest(
                chat=pb.Chat(messages=[*system, *self.turns, question]), sampling_params=self._params, model=self._model
            ),
            metadata=self._metadata,
        )
        answer, usage, cut = "", None, False
        try:
            for delta in call:
                answer += delta.text
                if delta.reasoning and self._out.isatty():
                    self._out.write(f"{DIM}{delta.reasoning}{PLAIN}")
                self._out.write(delta.text)
                self._out.flush()
                cut = cut or delta.finish_reason == pb.FINISH_REASON_ABORT
                if delta.HasField("usage"):
                    usage = delta.usage
        except KeyboardInterrupt:
            call.cancel()  # the server aborts the request
        except grpc.RpcError:
            if answer:  # what goes wrong after it begins a line of its own
                self._out.write("\n")
            raise
        self._out.write("\n")
        if cut:
            self._out.write("(the server ended this answer)\n")
        self.turns += [question, pb.ChatMessage(role="assistant", content=answer)]
        return usage


def loop(chat: Chat, read: Callable[[str], str], interactive: bool) -> None:
    """Asks until the input ends.

    Args:
        read: gives the next line, as `input` does.
        interactive: show a prompt, statistics and hints.
    """
    while True:
        try:
            line = read("> " if interactive else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)" if interactive else "")
            if not interactive:
                return
            continue
        if line in ("/quit", "/exit"):
            return
        if line.startswith("/"):
            print(_command(chat, line))
        elif line:
            _answer(chat, line, interactive)


def _command(chat: Chat, line: str) -> str:
    name, _, rest = line.partition(" ")
    if name == "/clear":
        chat.clear()
        return "The conversation is forgotten."
    if name == "/system":
        chat.system = rest.strip() or None
        return f"System prompt: {chat.system or 'none'}"
    return HELP


def _answer(chat: Chat, line: str, interactive: bool) -> None:
    began = time.monotonic()
    try:
        usage = chat.ask(line)
    except grpc.RpcError as error:
        print(f"error: {_words(error)}", file=sys.stderr)
        return
    if not interactive:
        return
    if usage is None:
        print("(stopped)")
        return
    rate = usage.completion_tokens / max(time.monotonic() - began, 1e-6)
    print(
        f"({usage.completion_tokens} tokens, {rate:.0f} a second, first after {usage.time_to_first_token_s:.2f} s)",
        file=sys.stderr,
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the chat. Returns the exit status: 1 when there is no server."""
    args = _parse(argv)
    params = SamplingParams()
    for name in ("temperature", "top_p", "max_tokens", "seed"):
        if getattr(args, name) is not None:
            setattr(params, name, getattr(args, name))
    try:
        opened = _channel(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with opened as channel:
        try:
            info = control_pb2_grpc.ControlStub(channel).GetModelInfo(
                control_pb2.GetModelInfoRequest(model=args.model), timeout=10.0, metadata=key_metadata(args.api_key)
            )
        except grpc.RpcError as error:
            print(_no_server(args.target, error), file=sys.stderr)
            return 1
        interactive = sys.stdin.isatty()
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - line editing and history for input()
            print(f"{info.id}, context {info.max_model_len} tokens. {HELP}")
        loop(Chat(channel, params, args.system, args.model, api_key=args.api_key), input, interactive)
    return 0


def _no_server(target: str, error: grpc.RpcError) -> str:
    words = _words(error)
    if words == LOST:
        return (
            f"There is no server at {target} that can be reached so. Start one: python -m serving.launch. "
            "If there is one, and it has TLS, say --tls, or --ssl-ca-certs FILE where its authority is your own."
        )
    if error.code() is grpc.StatusCode.UNAUTHENTICATED:  # type: ignore[attr-defined]
        return (
            f"The server at {target} asks for an API key: say --api-key KEY, or set {KEY_VARIABLE}. It answers: {words}"
        )
    return f"The server at {target} answers: {words}"


def _words(error: grpc.RpcError) -> str:
    """What the server said, or a sentence for what gRPC itself says."""
    return error_of(error, quiet=True).message  # type: ignore[arg-type]


def key_metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """The metadata of a call that brings a key."""
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def _channel(args: argparse.Namespace) -> grpc.Channel:
    """Raises ValueError for TLS files that cannot be used."""
    options = [("grpc.enable_retries", 0)]
    tls = ClientTls(args.ssl_ca_certs, args.ssl_keyfile, args.ssl_certfile)
    if not args.tls and tls == ClientTls():
        return grpc.insecure_channel(args.target, options=options)
    return grpc.secure_channel(args.target, grpc.ssl_channel_credentials(**tls.grpc_arguments()), options=options)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m serving.chat", description="A chat in the terminal, over gRPC.", epilog=HELP
    )
    parser.add_argument("--target", default="127.0.0.1:50051", help="the server's gRPC address (default: %(default)s)")
    parser.add_argument("--model", default="", help="which of the server's models (default: the base model)")
    parser.add_argument("--system", default=None, help="system prompt (default: none)")
    parser.add_argument("--temperature", type=float, default=None, help="default: the model's own")
    parser.add_argument("--top-p", type=float, default=None, help="default: the model's own")
    parser.add_argument("--max-tokens", type=int, default=None, help="of one answer (default: what the context leaves)")
    parser.add_argument("--seed", type=int, default=None, help="same seed, same answers")
    access = parser.add_argument_group("access")
    access.add_argument(
        "--api-key", default=os.environ.get(KEY_VARIABLE), metavar="KEY",
        help=f"for servers that ask for one, or {KEY_VARIABLE} in the environment, which other users of this machine do not see "
        "(default: none)",
    )  # fmt: skip
    access.add_argument("--tls", action="store_true", help="reach the server over TLS; implied by the flags below")
    access.add_argument(
        "--ssl-ca-certs", metavar="FILE", help="authorities of its certificate, PEM (default: the system's)"
    )
    access.add_argument("--ssl-keyfile", metavar="FILE", help="our certificate's key, for servers that ask, PEM")
    access.add_argument("--ssl-certfile", metavar="FILE", help="our certificate, for servers that ask, PEM")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
