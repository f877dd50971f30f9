"""A failure anywhere in one request's path ends that request, in a sentence, and no other one."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.errors import ErrorKind, RequestError
from serving.service import GenerateInput
from tests.mock_engine import MockEngine, MockTemplate, MockTokenizer, mock_service

SECRET = "/root/secret/path.py: 0xdeadbeef"


class PanicError(BaseException):
    """As pyo3's PanicException: Rust code that panics raises what is no `Exception`."""


def failing(error: BaseException, method: str, base: type) -> Any:
    """A tokenizer or template one of whose methods fails where the text has BAD in it (or the ids spell it)."""

    def fail(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "BAD" in repr(args) or "66, 65, 68" in repr(args):
            raise error
        return getattr(base, method)(self, *args, **kwargs)

    return type("Failing", (base,), {method: fail})()


async def run(service: Any, given: GenerateInput) -> str:
    prepared = await service.prepare(given, SamplingParams(max_tokens=40))
    return "".join([output.text async for output in service.generate(prepared)])


async def one_bad_among_good(service: Any, bad: GenerateInput, kind: ErrorKind = ErrorKind.INTERNAL) -> None:
    good = [run(service, GenerateInput(text=f"hello {i}")) for i in range(4)]
    results = await asyncio.gather(*good[:2], run(service, bad), *good[2:], return_exceptions=True)
    error = results.pop(2)
    assert isinstance(error, RequestError) and error.kind is kind
    assert "secret" not in error.message and "0x" not in error.message
    assert results == [f"hello {i}" for i in range(4)]
    assert service.num_live == 0 and not service.client.live


@pytest.mark.parametrize(
    "error", [RuntimeError(SECRET), KeyError(SECRET), RecursionError(), MemoryError(), PanicError(SECRET)]
)
@pytest.mark.parametrize("method", ["encode", "token_bytes"])
async def test_the_tokenizer(error, method):
    service = mock_service(MockEngine(), tokenizer=failing(error, method, MockTokenizer))
    if method == "encode":
        await one_bad_among_good(service, GenerateInput(text="BAD"))
        return

    # On the way out: the detokenizer asks for the bytes of each token.
    def fail(token: int) -> bytes:
        if token == ord("~"):
            raise error
        return MockTokenizer.token_bytes(service.tokenizer, token)

    service.tokenizer.token_bytes = fail
    results = await asyncio.gather(
        run(service, GenerateInput(text="a~b")), *(run(service, GenerateInput(text=f"ok {i}")) for i in range(3)),
        return_exceptions=True,
    )  # fmt: skip
    assert isinstance(results[0], RequestError) and results[1:] == [f"ok {i}" for i in range(3)]
    assert service.num_live == 0


@pytest.mark.parametrize("error", [RuntimeError(SECRET), PanicError(SECRET)])
async def test_the_chat_template(error):
    service = mock_service(MockEngine(), template=failing(error, "encode", MockTemplate))
    await one_bad_among_good(service, GenerateInput(messages=[{"role": "user", "content": "BAD"}]))


@pytest.mark.parametrize("error", [RuntimeError(SECRET), PanicError(SECRET)])
async def test_the_grammar_compiler(error):
    from serving.engine.api.sampling_params import StructuredOutputs

    class Compiler:
        def compile(self, grammar: Any) -> Any:
            raise error

    service = mock_service(MockEngine(), grammar_compiler=Compiler())  # type: ignore[arg-type]
    params = SamplingParams(max_tokens=4, structured_outputs=StructuredOutputs(regex="a"))
    with pytest.raises(RequestError) as caught:
        await service.prepare(GenerateInput(text="a"), params)
    assert caught.value.kind is ErrorKind.INTERNAL and "secret" not in caught.value.message
    assert await run(service, GenerateInput(text="fine")) == "fine"


async def test_the_engine():
    engine = MockEngine()
    service = mock_service(engine)
    engine.fail_next = "the model's logits are not finite."
    bad = asyncio.ensure_future(run(service, GenerateInput(text="hello bad")))
    await asyncio.sleep(0)
    results = await asyncio.gather(
        bad, *(run(service, GenerateInput(text=f"ok {i}")) for i in range(3)), return_exceptions=True
    )
    assert sum(isinstance(r, RequestError) for r in results) == 1
