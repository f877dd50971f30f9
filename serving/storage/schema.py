"""The tables, and what keeps their sizes: plain functions over a connection, called on its own thread."""

from __future__ import annotations

import sqlite3
import time

VERSION = 1
TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, tenant TEXT NOT NULL, created REAL NOT NULL, expires REAL NOT NULL,
    size INTEGER NOT NULL, body TEXT NOT NULL, data BLOB
);
CREATE INDEX IF NOT EXISTS entries_of_tenant ON entries (tenant, kind, created);
CREATE INDEX IF NOT EXISTS entries_by_end ON entries (expires);
CREATE TABLE IF NOT EXISTS items (
    owner TEXT NOT NULL REFERENCES entries (id) ON DELETE CASCADE, position INTEGER NOT NULL, id TEXT NOT NULL,
    body TEXT NOT NULL, PRIMARY KEY (owner, position), UNIQUE (owner, id)
);
"""


def connect(path: str) -> sqlite3.Connection:
    """A connection to the file, with its tables made.

    Raises:
        sqlite3.Error: the file cannot be used.
        ValueError: it is of another version, in a sentence.
    """
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, VERSION):
        connection.close()
        raise ValueError(f"was written by another version of jaxserve (layout {version}, this is {VERSION})")
    connection.executescript(TABLES)
    connection.execute(f"PRAGMA user_version = {VERSION}")
    return connection


def drop_expired(db: sqlite3.Connection, now: float | None = None) -> list[tuple[str, str]]:
    """Removes what has expired; returns the (kind, id) of each."""
    moment = time.time() if now is None else now
    return db.execute("DELETE FROM entries WHERE expires <= ? RETURNING kind, id", (moment,)).fetchall()


def make_room(db: sqlite3.Connection, most: int, keep: str) -> list[tuple[str, str]]:
    """Removes entries until all together have at most `most` bytes: always the oldest of the tenant that has most, so that
    nobody's entries go because of somebody else's.

    Args:
        keep: an entry that stays.
    Returns:
        the (kind, id) of each.
    """
    gone: list[tuple[str, str]] = []
    while True:
        (total,) = db.execute("SELECT coalesce(sum(size), 0) FROM entries").fetchone()
        if total <= most:
            return gone
        found = db.execute(
            "SELECT kind, id FROM entries WHERE id != ?1 AND tenant = (SELECT tenant FROM entries WHERE id != ?1 "
            "GROUP BY tenant ORDER BY sum(size) DESC LIMIT 1) ORDER BY created, rowid LIMIT 1",
            (keep,),
        ).fetchone()
        if found is None:
            return gone
        db.execute("DELETE FROM entries WHERE id = ?", (found[1],))
        gone.append(found)
