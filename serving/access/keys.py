"""API keys: kept as digests, compared in constant time, each with a name and a role.

A key is 32 random bytes, so one SHA-256 of it cannot be searched for: slow password hashes (scrypt, argon2) protect
secrets that people choose, and would cost every request milliseconds here. Keys shorter than `MIN_SECRET_CHARS` could be
searched for: they are taken, and warned of.
"""

from __future__ import annotations

import contextvars
import dataclasses
import enum
import hashlib
import hmac
import pathlib
import re
import secrets
from collections.abc import Iterable, Sequence

from serving.errors import ErrorKind, RequestError

MIN_SECRET_CHARS = 16
MAX_SECRET_CHARS = 1024
"""A longer one is refused unhashed: hashing what anybody sends should cost no more than a microsecond."""

PREFIX = "sk-"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")


class Role(enum.Enum):
    """What a key may do."""

    USER = "user"  # requests, and what tells about the model
    MONITOR = "monitor"  # what the server does for everybody together (`/metrics`), and no requests: scrapers
    PROXY = "proxy"  # both, and names the tenants it asks for: gateways
    ADMIN = "admin"  # all, and control: drain, sleep, new weights, ending others' requests

    def allows(self, needed: Role) -> bool:
        """Whether a key of this role may do what one of the role `needed` may."""
        return needed is self or self is Role.ADMIN or (self is Role.PROXY and needed is not Role.ADMIN)


@dataclasses.dataclass(frozen=True)
class Caller:
    """Who sent the request that a task serves.

    Attributes:
        name: the key's name: the tenant of fair sharing, the owner of what it started. Never the key itself.
        cache_scope: whose cached prompt pages its requests may share; None: those of all who have none.
    """

    name: str
    role: Role
    cache_scope: str | None = None

    def tenant(self, asked: str | None) -> str:
        """The tenant of a request: its own name, unless it speaks for others."""
        return asked if asked and self.role.allows(Role.PROXY) else self.name

    def share(self, asked: str | None) -> str | None:
        """Whose share of the server's room a request takes: its own, or the tenant's for whom it speaks; None where it speaks for
        nobody by name."""
        return (asked or None) if self.role.allows(Role.PROXY) else self.name

    def cache_salt(self, asked: str | None) -> str | None:
        """The salt of a request's cached pages. A digest, so that scope and salt cannot be written to look like
        another pair, and so that gateways can hand it on within the bounds of a name."""
        if self.cache_scope is None:
            return asked
        return hashlib.sha256(f"{self.cache_scope}:{asked or ''}".encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def check_requests(self) -> None:
        """Refuses requests of a key that only watches.

        Raises:
            RequestError: PERMISSION_DENIED.
        """
        if not self.role.allows(Role.USER):
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                f"This key's role is {self.role.value}: it reads what the server tells about itself, and sends no requests.",
                code="user_key_needed",
            )

    def check_priority(self, priority: int) -> None:
        """Refuses a priority ahead of everybody's for a key that speaks for itself alone.

        Raises:
            RequestError: PERMISSION_DENIED.
        """
        if priority < 0 and not self.role.allows(Role.PROXY):
            raise RequestError(
                ErrorKind.PERMISSION_DENIED,
                f"priority is {priority}: this key may go behind others (0 or more), not ahead of them.",
                param="priority",
                code="priority_denied",
            )

    def may_end(self, owner: str | None) -> bool:
        """Whether it may end a request that the key `owner` began."""
        return self.role is Role.ADMIN or owner == self.name


caller_of_task: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("jaxserve_caller", default=None)
"""Whom the running task serves; front ends set it when keys are required. None: nobody was asked."""


@dataclasses.dataclass(frozen=True)
class _Key:
    caller: Caller
    digest: bytes


class KeyRing:
    """Keys that are accepted. Without any, nobody is asked for one.

    Args:
        keys: (name, role, digest) of each; `digest` is the SHA-256 of the key's UTF-8.
    Raises:
        ValueError: two keys of one name, or one key twice.
    Attributes:
        weak: names of those that are short enough to be guessed.
    """

    def __init__(self, keys: Iterable[tuple[str, Role, bytes]] = (), weak: Iterable[str] = ()) -> None:
        self.weak = tuple(weak)
        self._keys = tuple(_Key(Caller(name, role), digest) for name, role, digest in keys)
        names = [key.caller.name for key in self._keys]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two API keys are called {name!r}: give each a name of its own.")
        if len({key.digest for key in self._keys}) < len(self._keys):
            raise ValueError("an API key is listed twice under different names.")

    def __bool__(self) -> bool:
        return bool(self._keys)

    def all(self) -> tuple[_Key, ...]:
        """Every key."""
        return self._keys

    @property
    def has_admin(self) -> bool:
        return any(key.caller.role is Role.ADMIN for key in self._keys)

    def find(self, secret: str) -> Caller | None:
        """Whose key this is, or None.

        Every key is compared, in constant time, whichever fits: how long it takes tells nothing but how many there are.
        """
        if not secret or len(secret) > MAX_SECRET_CHARS:
            return None
        digest = _digest(secret)
        found: Caller | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key.caller
        return found

    @classmethod
    def of(
        cls,
        users: Sequence[str] = (),
        admins: Sequence[str] = (),
        file: str | None = None,
        monitors: Sequence[str] = (),
    ) -> KeyRing:
        """Keys given plainly (flags, environment), named key-1, key-2, ..., admin-1, ... and monitor-1, ..., and those of a
        file.

        Raises:
            ValueError: a key that no header could carry, or a file that is not one of keys.
            OSError: the file cannot be read.
        """
        plain = [(f"key-{i}", Role.USER, secret) for i, secret in enumerate(users, 1)]
        plain += [(f"admin-{i}", Role.ADMIN, secret) for i, secret in enumerate(admins, 1)]
        plain += [(f"monitor-{i}", Role.MONITOR, secret) for i, secret in enumerate(monitors, 1)]
        keys = [(name, role, _checked(secret)) for name, role, secret in plain]
        if file is not None:
            keys += read_file(pathlib.Path(file).expanduser())
        return cls(keys, [name for name, _, secret in plain if len(secret) < MIN_SECRET_CHARS])


def read_file(path: pathlib.Path) -> list[tuple[str, Role, bytes]]:
    """Keys of a file: `name role sha256:hex` a line; `#` begins a comment.

    Raises:
        ValueError: a line that is none, told by its number and without its text.
        OSError: it cannot be read.
    """
    keys = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file.") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split("#", 1)[0].split()
        if not words:
            continue
        try:
            keys.append(key_of(words))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, {error} `python -m serving.access FILE NAME` writes such lines."
            ) from None
    return keys


def key_of(words: Sequence[str]) -> tuple[str, Role, bytes]:
    """A key from its name, its role and `sha256:hex`.

    Raises:
        ValueError: they are none, told without their text.
    """
    roles = {role.value: role for role in Role}
    digest = _DIGEST.fullmatch(words[2]) if len(words) == 3 else None
    if digest is None or not _NAME.fullmatch(words[0]) or words[1] not in roles:
        raise ValueError(f"is not 'name role sha256:<64 hex digits>' with a role of {', '.join(roles)}.")
    return words[0], roles[words[1]], bytes.fromhex(digest[1])


def new_secret() -> str:
    """A fresh key: 256 random bits."""
    return PREFIX + secrets.token_urlsafe(32)


def file_line(name: str, role: Role, secret: str) -> str:
    """The line of a key file for a key.

    Raises:
        ValueError: the name has other characters than letters, digits, `.`, `_` and `-`, or more than 64.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"a key's name takes up to 64 letters, digits, '.', '_' and '-'; got {name!r}.")
    return f"{name} {role.value} sha256:{_digest(secret).hex()}"


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).digest()


def _checked(secret: str) -> bytes:
    if not secret or not secret.isascii() or not secret.isprintable() or " " in secret:
        raise ValueError(
            f"an API key takes printable ASCII characters without blanks, got one of {len(secret)} characters that does not. "
            "`python -m serving.access FILE NAME` makes good ones."
        )
    return _digest(secret)
