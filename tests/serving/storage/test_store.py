"""The store: one tenant's entries, until they expire or there is no room."""

from __future__ import annotations

import os
import pathlib
from collections.abc import AsyncIterator

import pytest

from serving.boot.flags.launch import build_parser
from serving.errors import RequestError
from serving.storage import Entry, Store, StoreSettings
from serving.storage.flags import store_of


def entry(entry_id: str, kind: str = "file", **body: object) -> Entry:
    return Entry(kind, entry_id, {"id": entry_id, **body}, data=["x"])


@pytest.fixture
async def store(tmp_path: pathlib.Path) -> AsyncIterator[Store]:
    made = Store(StoreSettings(tmp_path, max_bytes=2000))
    yield made
    await made.stop()


async def test_entries_are_their_tenants(store: Store):
    await store.put("a", entry("1", size=1))
    await store.put("b", entry("1", size=2))  # not its own: changes nothing
    assert (await store.get("a", "file", "1")) == entry("1", size=1)
    assert await store.get("b", "file", "1") is None and await store.get("a", "batch", "1") is None
    assert not await store.delete("b", "file", "1") and await store.delete("a", "file", "1")
    assert await store.get("a", "file", "1") is None


async def test_pages_go_either_way(store: Store):
    for i in range(5):
        await store.put("a", entry(str(i)))
    page = await store.page("a", "file", 2, None)
    assert [body["id"] for body in page.bodies] == ["4", "3"] and page.has_more
    page = await store.page("a", "file", 9, "3")
    assert [body["id"] for body in page.bodies] == ["2", "1", "0"] and not page.has_more
    assert [body["id"] for body in (await store.page("a", "file", 9, "3", newest_first=False)).bodies] == ["4"]


async def test_the_oldest_of_who_has_most_goes(store: Store):
    gone: list[tuple[str, str]] = []
    store.removed_listeners.append(lambda *one: gone.append(one))
    await store.put("small", entry("s", text="x" * 300))
    for i in range(6):
        await store.put("large", entry(f"l{i}", text="x" * 400))
    assert gone == [("file", f"l{i}") for i in range(len(gone))] and 0 < len(gone) < 5
    assert await store.get("small", "file", "s") is not None and await store.get("large", "file", "l5") is not None


async def test_what_expired_is_gone(tmp_path: pathlib.Path):
    store = Store(StoreSettings(tmp_path, expiry_s=0.0))
    await store.put("a", entry("1"))
    assert await store.get("a", "file", "1") is None
    assert not (await store.page("a", "file", 9, None)).bodies
    await store.stop()


async def test_items_keep_their_order_and_their_ids_are_unique(store: Store):
    await store.put("a", entry("c", "conversation"))
    assert await store.add_items("a", "conversation", "c", [{"id": "i"}, {"id": "j"}])
    assert not await store.add_items("b", "conversation", "c", [{"id": "k"}])
    with pytest.raises(RequestError, match="ids"):
        await store.add_items("a", "conversation", "c", [{"id": "k"}, {"id": "j"}])
    assert await store.add_items("a", "conversation", "c", [{"id": "k"}, {"id": "j"}], skip_known=True)
    assert [item["id"] for item in await store.items("a", "conversation", "c") or ()] == ["i", "j", "k"]
    assert await store.items("b", "conversation", "c") is None
    assert await store.delete_item("a", "conversation", "c", "i") and not await store.delete_item(
        "a", "conversation", "c", "i"
    )
    await store.delete("a", "conversation", "c")
    await store.put("a", entry("c", "conversation"))
    assert await store.items("a", "conversation", "c") == []


async def test_it_is_there_after_a_restart_and_nobody_elses_meanwhile(tmp_path: pathlib.Path):
    store = Store(StoreSettings(tmp_path))
    await store.put("a", entry("1"))
    with pytest.raises(ValueError, match="another server"):
        Store(StoreSettings(tmp_path))
    await store.stop()
    again = Store(StoreSettings(tmp_path))
    assert await again.get("a", "file", "1") is not None
    assert os.stat(tmp_path).st_mode & 0o777 == 0o700
    await again.stop()


def test_flags(tmp_path: pathlib.Path):
    parser = build_parser()
    assert store_of(parser.parse_args([])) is None
    made = store_of(parser.parse_args(["--store-dir", str(tmp_path / "a"), "--store-gb", "0.5"]))
    assert made is not None and made.folder == tmp_path / "a"
    made.close()
    with pytest.raises(ValueError, match="store_days"):
        store_of(parser.parse_args(["--store-days", "0"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used"):
        store_of(parser.parse_args(["--store-dir", str(tmp_path / "file")]))
