"""The one error type that a request's author sees, whatever entry it came through.

Front ends translate `ErrorKind` to their protocol (gRPC status, HTTP code); nothing else about a failure
leaves the server.
"""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterator, Mapping


class ErrorKind(enum.Enum):
    """What went wrong, in the vocabulary of gRPC's status codes. The value is (gRPC status name, HTTP code)."""

    INVALID_ARGUMENT = ("INVALID_ARGUMENT", 400)
    UNAUTHENTICATED = ("UNAUTHENTICATED", 401)
    PERMISSION_DENIED = ("PERMISSION_DENIED", 403)
    NOT_FOUND = ("NOT_FOUND", 404)
    FAILED_PRECONDITION = ("FAILED_PRECONDITION", 409)
    RESOURCE_EXHAUSTED = ("RESOURCE_EXHAUSTED", 429)
    DEADLINE_EXCEEDED = ("DEADLINE_EXCEEDED", 504)
    UNIMPLEMENTED = ("UNIMPLEMENTED", 501)
    UNAVAILABLE = ("UNAVAILABLE", 503)
    INTERNAL = ("INTERNAL", 500)

    @property
    def grpc_status(self) -> str:
        return self.value[0]

    @property
    def http_status(self) -> int:
        return self.value[1]


DIED = "engine_died"
"""`RequestError.code` of requests that were running when the engine died: where nothing of an answer is out yet, another
replica may be asked."""


class RequestError(Exception):
    """A request that cannot be served, with a sentence for the person who sent it.

    Args:
        kind: the class of failure.
        message: what was wrong, the value, the limit, what to do. Never internal text (paths, addresses, stacks).
        param: the request field at fault, as the client spells it, or None.
        code: a short machine-readable word for clients (OpenAI's `error.code`), or None.
        retry_after_s: seconds after which trying again makes sense (queue full, draining), or None.
    """

    def __init__(
        self,
        kind: ErrorKind,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def renamed(self, names: Mapping[str, str]) -> RequestError:
        """The same error with `param` as the client of one entry spells it, in the sentence too.

        Args:
            names: our name -> the client's; `a` stands for `a.b` and `a[0]` too, the longest that fits counts.
        """
        param = self.param
        if param is None:
            return self
        fitting = [name for name in names if param == name or param.startswith((f"{name}.", f"{name}["))]
        if not fitting:
            return self
        ours = max(fitting, key=len)
        said = names[ours] + param[len(ours) :]
        # Words of prose ("messages") are left alone but at the sentence's head, where they name the field.
        where = "" if re.search(r"[_.\[]", param) else "^"
        message = re.sub(rf"{where}(?<![\w.]){re.escape(param)}(?![\w\[])", lambda _: said, self.message)
        return RequestError(self.kind, message, param=said, code=self.code, retry_after_s=self.retry_after_s)


@contextlib.contextmanager
def named(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the fields of errors raised inside, see `RequestError.renamed`."""
    try:
        yield
    except RequestError as error:
        raise error.renamed(names) from error


def invalid(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """An INVALID_ARGUMENT error about `param`."""
    return RequestError(ErrorKind.INVALID_ARGUMENT, message, param=param, code=code)


CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""`RequestError.code` of what the model's context has no room for. Clients go by it, or by how the sentence begins (as
OpenAI's and vLLM's does), to shorten a conversation or to ask a model with a longer context."""


def beyond_context(context: int, what: str, param: str, prompt: str = "prompt") -> RequestError:
    """The error for what does not fit the model's context of `context` tokens.

    Args:
        what: what was asked for, behind "However, ".
        param: the field that holds the prompt.
        prompt: what to shorten.
    """
    return invalid(
        f"This model's maximum context length is {context} tokens. However, {what}. Please reduce the length of the {prompt}.",
        param,
        CONTEXT_LENGTH_EXCEEDED,
    )


_KINDS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (type(None), "null"),
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "text"),
    ((list, tuple), "a list"),
    (dict, "an object"),
)


def kind_of(value: object) -> str:
    """What a value is, in the words of JSON: no client knows Python's names."""
    return next((name for kind, name in _KINDS if isinstance(value, kind)), "something else")
