"""Entries and their items, off the event loop: one connection on one thread."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import sqlite3
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from serving.errors import ErrorKind, RequestError
from serving.storage.schema import connect, drop_expired, make_room

T = TypeVar("T")
SWEEP_EVERY_S = 60.0


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """Where a store lies, and its bounds.

    Attributes:
        folder: made where it is not there, for this user alone.
        expiry_s: seconds that an entry is kept behind its last change, or its last use in a conversation.
        max_bytes: of all entries together; then the oldest of the tenant that has most go.
    """

    folder: pathlib.Path
    expiry_s: float = 30 * 86400.0
    max_bytes: int = 2**30


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that is kept.

    Attributes:
        kind: "response", "conversation", "file" or "batch".
        body: what clients see of it.
        data: what belongs to it and is not shown with it, as JSON has it.
    """

    kind: str
    id: str
    body: dict[str, Any]
    data: Any = None


@dataclasses.dataclass(frozen=True)
class Page:
    """A part of a list, and whether there is more behind it."""

    bodies: list[dict[str, Any]]
    has_more: bool


class Store:
    """What clients may ask for again. Whose an entry is, is asked with every call: another tenant's is as if it were not there.

    Attributes:
        removed_listeners: told the kind and id of each entry that is gone.
        closing: what `stop` waits for.
    Raises:
        ValueError: the folder cannot be used, in a sentence.
    """

    def __init__(self, settings: StoreSettings) -> None:
        self._settings = settings
        folder = settings.folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o700)
            self._lock = _locked(folder / "lock")
            self._db = connect(str(folder / "store.sqlite3"))
        except BlockingIOError:
            raise ValueError(f"store_dir {folder} is used by another server: give each its own.") from None
        except (OSError, sqlite3.Error, ValueError) as error:
            raise ValueError(f"store_dir {folder} cannot be used ({error}).") from None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="jaxserve-store")
        self._swept = 0.0
        self.removed_listeners: list[Callable[[str, str], None]] = []
        self.closing: list[Callable[[], Awaitable[None]]] = []

    @property
    def folder(self) -> pathlib.Path:
        return self._settings.folder

    # -- entries -----------------------------------------------------------------------------------------------------

    async def put(self, tenant: str, entry: Entry, extra_bytes: int = 0) -> None:
        """Keeps an entry, in the place of one with its id.

        Args:
            extra_bytes: that belong to it and lie elsewhere.
        """

        def work(db: sqlite3.Connection) -> list[tuple[str, str]]:
            body = _packed(entry.body)
            data = None if entry.data is None else zlib.compress(_packed(entry.data).encode(), 1)
            size, now = len(body) + len(data or b"") + extra_bytes, time.time()
            db.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET expires = excluded.expires, "
                "size = excluded.size + (SELECT coalesce(sum(length(body)), 0) FROM items WHERE owner = entries.id), "
                "body = excluded.body, data = excluded.data WHERE tenant = excluded.tenant",
                (entry.id, entry.kind, tenant, now, now + self._settings.expiry_s, size, body, data),
            )
            return self._tidy(db, entry.id)

        self._tell(await self._run(work))

    async def get(self, tenant: str, kind: str, entry_id: str) -> Entry | None:
        """The entry, or None where this tenant has none of that kind and id."""
        return await self._run(lambda db: _get(db, tenant, kind, entry_id))

    async def delete(self, tenant: str, kind: str, entry_id: str) -> bool:
        """Whether there was one to remove."""
        found = await self._run(
            lambda db: db.execute(
                "DELETE FROM entries WHERE id = ? AND tenant = ? AND kind = ? RETURNING kind, id",
                (entry_id, tenant, kind),
            ).fetchall()
        )
        self._tell(found)
        return bool(found)

    async def page(self, tenant: str, kind: str, limit: int, after: str | None, newest_first: bool = True) -> Page:
        """Entries in the order in which they were made, behind the entry `after`."""
        way, order = ("<", "DESC") if newest_first else (">", "ASC")

        def work(db: sqlite3.Connection) -> Page:
            rows = db.execute(
                f"SELECT body FROM entries WHERE tenant = ?1 AND kind = ?2 AND expires > ?3 AND (?4 IS NULL OR rowid {way} "
                f"(SELECT rowid FROM entries WHERE id = ?4)) ORDER BY rowid {order} LIMIT ?5",
                (tenant, kind, time.time(), after, limit + 1),
            ).fetchall()
            return Page([json.loads(body) for (body,) in rows[:limit]], len(rows) > limit)

        return await self._run(work)

    async def everyones(self, kind: str) -> list[tuple[str, Entry]]:
        """All entries of a kind with their tenants: for the server itself, at its start."""

        def work(db: sqlite3.Connection) -> list[tuple[str, Entry]]:
            rows = db.execute("SELECT tenant, id, body, data FROM entries WHERE kind = ?", (kind,)).fetchall()
            return [(tenant, _entry(kind, entry_id, body, data)) for tenant, entry_id, body, data in rows]

        return await self._run(work)

    async def chain(self, tenant: str, kind: str, last_id: str, before: str, most: int) -> list[Entry] | None:
        """An entry and those that it follows on, the first one first; they are kept as if they were new.

        Args:
            before: the field of a body that names the entry before it.
            most: entries; the chain ends there.
        Returns:
            None where one of them is not there.
        """

        def work(db: sqlite3.Connection) -> list[Entry] | None:
            found: list[Entry] = []
            wanted: str | None = last_id
            while wanted is not None and len(found) < most:
                entry = _get(db, tenant, kind, wanted)
                if entry is None:
                    return None
                found.append(entry)
                wanted = entry.body.get(before)
            end = time.time() + self._settings.expiry_s
            db.executemany("UPDATE entries SET expires = ? WHERE id = ?", [(end, entry.id) for entry in found])
            return found[::-1]

        return await self._run(work)

    # -- items of an entry -------------------------------------------------------------------------------------------

    async def add_items(
        self, tenant: str, kind: str, owner: str, items: Sequence[dict[str, Any]], skip_known: bool = False
    ) -> bool:
        """Puts items behind those of an entry, each with its `id`; False where there is no such entry.

        Args:
            skip_known: leave out those whose id is there already, instead of refusing all.
        Raises:
            RequestError: INVALID_ARGUMENT: it has an item of that id already.
        """
        bodies = [(str(item["id"]), _packed(item)) for item in items]

        def work(db: sqlite3.Connection) -> list[tuple[str, str]] | None:
            if _get(db, tenant, kind, owner) is None:
                return None
            (last,) = db.execute("SELECT coalesce(max(position), -1) FROM items WHERE owner = ?", (owner,)).fetchone()
            rows = [(owner, last + 1 + i, item_id, body) for i, (item_id, body) in enumerate(bodies)]
            db.executemany(f"INSERT {'OR IGNORE ' if skip_known else ''}INTO items VALUES (?, ?, ?, ?)", rows)
            db.execute(
                "UPDATE entries SET size = size + ?, expires = ? WHERE id = ?",
                (sum(len(body) for _, body in bodies), time.time() + self._settings.expiry_s, owner),
            )
            return self._tidy(db, owner)

        try:
            gone = await self._run(work)
        except sqlite3.IntegrityError:
            raise RequestError(
                ErrorKind.INVALID_ARGUMENT, "items: one of these ids is there already.", param="items"
            ) from None
        self._tell(gone or ())
        return gone is not None

    async def items(self, tenant: str, kind: str, owner: str) -> list[dict[str, Any]] | None:
        """All items of an entry, in order; None where there is no such entry."""

        def work(db: sqlite3.Connection) -> list[dict[str, Any]] | None:
            if _get(db, tenant, kind, owner) is None:
                return None
            rows = db.execute("SELECT body FROM items WHERE owner = ? ORDER BY position", (owner,))
            return [json.loads(body) for (body,) in rows]

        return await self._run(work)

    async def delete_item(self, tenant: str, kind: str, owner: str, item_id: str) -> bool:
        """Whether there was such an item to remove."""

        def work(db: sqlite3.Connection) -> bool:
            if _get(db, tenant, kind, owner) is None:
                return False
            gone = db.execute(
                "DELETE FROM items WHERE owner = ? AND id = ? RETURNING length(body)", (owner, item_id)
            ).fetchall()
            db.execute("UPDATE entries SET size = size - ? WHERE id = ?", (sum(size for (size,) in gone), owner))
            return bool(gone)

        return await self._run(work)

    async def stop(self) -> None:
        """Ends what still writes here (`closing`), then closes."""
        for end in self.closing:
            await end()
        await asyncio.to_thread(self.close)

    def close(self) -> None:
        """Writes what is not written yet, and lets go of the folder."""
        self._executor.shutdown(wait=True)
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        os.close(self._lock)

    # -- inside ------------------------------------------------------------------------------------------------------

    async def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Does work on the store's thread, as one transaction."""

        def transaction() -> T:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                value = work(self._db)
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")
            return value

        return await asyncio.get_running_loop().run_in_executor(self._executor, transaction)

    def _tidy(self, db: sqlite3.Connection, keep: str) -> list[tuple[str, str]]:
        gone: list[tuple[str, str]] = []
        if time.monotonic() - self._swept > SWEEP_EVERY_S or not self._swept:
            self._swept = time.monotonic()
            gone += drop_expired(db)
        return gone + make_room(db, self._settings.max_bytes, keep)

    def _tell(self, removed: Iterable[tuple[str, str]]) -> None:
        for kind, entry_id in removed:
            for listener in self.removed_listeners:
                listener(kind, entry_id)


def _get(db: sqlite3.Connection, tenant: str, kind: str, entry_id: str) -> Entry | None:
    row = db.execute(
        "SELECT body, data FROM entries WHERE id = ? AND tenant = ? AND kind = ? AND expires > ?",
        (entry_id, tenant, kind, time.time()),
    ).fetchone()
    return None if row is None else _entry(kind, entry_id, *row)


def _entry(kind: str, entry_id: str, body: str, data: bytes | None) -> Entry:
    return Entry(kind, entry_id, json.loads(body), None if data is None else json.loads(zlib.decompress(data)))


def _packed(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def _locked(path: pathlib.Path) -> int:
    """A file that this process alone holds, until it ends.

    Raises:
        BlockingIOError: another one does.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(file)
        raise
    return file
