"""Keys and rates that several gateways share, in Redis.

Redis gone: rates go on by what each gateway counts itself, keys stay those that were last read; neither ends a request. Redis back:
both are shared again within a second or two.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from serving.access.keys import KeyRing, Role, key_of
from serving.access.rates import RateMeter, refusal
from serving.installation import extra

log = logging.getLogger("serving.access")

PREFIX = "jaxserve:"
KEYS = PREFIX + "keys"
"""A hash: a key's name -> "role sha256:<64 hex digits>", as in a key file."""
WAIT_S = 0.25
"""What a request waits for Redis at most."""
AGAIN_S = 1.0
"""How long Redis is left alone after it has failed."""

# A token bucket as RateMeter's, by Redis' own clock: gateways' clocks may differ. KEYS[1]: the bucket. ARGV: requests a minute, how
# many now. Gives "" where they pass, else the seconds until they would.
TAKE = """
local most, count = tonumber(ARGV[1]), tonumber(ARGV[2])
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1000000
local held = redis.call('HMGET', KEYS[1], 'left', 'at')
local left, at = tonumber(held[1] or most), tonumber(held[2] or now)
left = math.min(most, left + math.max(0, now - at) * most / 60)
local needed, wait = math.min(count, most), ''
if left < needed then wait = tostring((needed - left) * 60 / most) else left = left - count end
redis.call('HSET', KEYS[1], 'left', tostring(left), 'at', string.format('%.6f', now))
redis.call('EXPIRE', KEYS[1], 120 + math.ceil(math.max(0, -left) * 60 / most))
return wait
"""


def connect(url: str) -> Any:
    """A client of Redis. It connects when it is first used.

    Raises:
        ValueError: the package is missing, or a URL that is none.
    """
    try:
        import redis.asyncio
    except ImportError:
        raise ValueError(f"redis_url needs the package redis: {extra('redis')}.") from None
    try:
        return redis.asyncio.from_url(
            url, socket_timeout=WAIT_S, socket_connect_timeout=WAIT_S, health_check_interval=10, decode_responses=True
        )
    except ValueError as error:
        raise ValueError(f"redis_url cannot be used ({error}).") from None


class SharedMeter:
    """Counts requests by key, together with every other gateway at the same Redis.

    Args:
        client: of Redis, asynchronous.
        per_minute: requests of one key in a minute, over all gateways; None: no bound.
    """

    def __init__(self, client: Any, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._own = RateMeter(per_minute)
        self._take = client.register_script(TAKE)
        self._clock = clock
        self._away_until = 0.0
        self._away = False

    async def ask(self, name: str, count: int = 1) -> None:
        """See RateMeter.ask; without Redis, of this gateway alone.

        Raises:
            RequestError: RESOURCE_EXHAUSTED, with the seconds until there is room.
        """
        if self._per_minute is None:
            return
        if self._clock() < self._away_until:
            return self._own.take(name, count)
        try:
            async with asyncio.timeout(2 * WAIT_S):
                wait = await self._take(keys=[f"{PREFIX}rate:{name}"], args=[self._per_minute, count])
        except Exception as error:  # whatever is wrong with Redis is not wrong with the request
            self._away_until = self._clock() + AGAIN_S
            if not self._away:
                self._away = True
                log.warning("Redis does not answer (%s): each gateway counts its own requests meanwhile", _what(error))
            return self._own.take(name, count)
        if self._away:
            self._away = False
            log.warning("Redis answers again: gateways count together")
        if wait:
            raise refusal(self._per_minute, float(wait))
        self._own.note(name, count)  # so that it begins with what this gateway has let through, should Redis go


class SharedKeys(KeyRing):
    """Keys that are kept in Redis beside those of flags and files. It asks for a key even while it knows none."""

    def __init__(self, own: KeyRing, client: Any, refresh_s: float = 5.0) -> None:
        super().__init__()
        self._own = own
        self._client = client
        self._refresh_s = refresh_s
        self._away = False
        self.weak = own.weak
        self._take(())

    def __bool__(self) -> bool:
        return True

    async def read(self) -> bool:
        """Reads the keys once; whether that went well. A line that is no key is left out, and told."""
        try:
            async with asyncio.timeout(4 * WAIT_S):
                found = await self._client.hgetall(KEYS)
        except Exception as error:
            if not self._away:
                self._away = True
                log.warning("the keys in Redis cannot be read (%s): those known stay", _what(error))
            return False
        self._away = False
        keys: list[tuple[str, Role, bytes]] = []
        for name, value in found.items():
            try:
                keys.append(key_of([name, *str(value).split()]))
            except ValueError:
                log.warning("the key %r in Redis is not 'role sha256:<64 hex digits>': it is left out", name)
        self._take(keys)
        return True

    async def follow(self) -> None:
        """Reads them again and again, until it is cancelled."""
        while True:
            await asyncio.sleep(self._refresh_s)
            await self.read()

    def _take(self, keys: Any) -> None:
        names = {key.caller.name for key in self._own.all()}
        digests = {key.digest for key in self._own.all()}
        fresh = KeyRing(_distinct([key for key in keys if key[0] not in names and key[2] not in digests]))
        self._keys = (*self._own.all(), *fresh.all())


def _distinct(keys: list[tuple[str, Role, bytes]]) -> list[tuple[str, Role, bytes]]:
    """Of one digest under several names the first: whose it is must not depend on chance."""
    found: dict[bytes, tuple[str, Role, bytes]] = {}
    for key in sorted(keys, key=lambda one: one[0]):
        found.setdefault(key[2], key)
    return list(found.values())


async def close(client: Any) -> None:
    """Ends the connections."""
    with contextlib.suppress(Exception):
        await client.aclose()


def _what(error: BaseException) -> str:
    return str(error) or type(error).__name__
