"""Pages on the host: taken out, lent, accepted from elsewhere, and put back to where nobody else's are touched."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from serving.engine.device.stores.page_store import READ, PageStore, read_pages
from serving.engine.device.stores.parts import packed, row_bytes, slices, unpacked, whole
from serving.engine.requests.commands import PagesDropped, PagesIn, PagesOut
from serving.engine.requests.moves import PageMove

PAGES = 40


def pools(dtype):
    """Two arrays, like K and V of one layer, with different content everywhere."""
    return tuple(
        (jnp.arange(PAGES * 2 * 8, dtype=jnp.float32).reshape(PAGES, 2, 8) % 97 + 10 * i).astype(dtype) for i in (0, 1)
    )


def made():
    store = PageStore()
    store.bind({READ: jax.jit(read_pages)})
    store.restore_page_s = 1.0  # nothing to be timed
    return store


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere a program writes")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "float8_e4m3fn"])
def test_pages_travel_and_touch_no_other(dtype):
    kv, other = pools(dtype), tuple(jnp.zeros_like(a) for a in pools(dtype))
    giver, taker = made(), made()
    which = list(range(3, 23))  # more than a parcel
    lent = giver.lend(kv, PagesOut.of([PageMove(0, page, b"%d" % page) for page in which]))
    assert len(giver) == 0, "what is lent is not kept"
    contents = [packed(rows) for rows in lent]
    assert [len(c) for c in contents] == [sum(row_bytes(kv))] * 20
    goal = [39 - i for i in range(20)]
    moves = PagesIn.of([PageMove(0, page, b"in %d" % page) for page in goal])
    for key, content in zip(moves.keys, contents, strict=True):
        taker.accept(other, 0, key, unpacked(content, other))
    other = taker.put_back(other, moves)
    taker.discard(moves)
    assert len(taker) == 0
    for before, after in zip(kv, other, strict=True):
        before, after = (np.asarray(jnp.asarray(a), np.float32) for a in (before, after))
        np.testing.assert_array_equal(after[goal], before[which])
        rest = [page for page in range(PAGES) if page not in goal]
        assert not after[rest].any()


def test_heads_cut_over_devices_make_a_whole_page_and_are_cut_again():
    """Between engines a page travels whole, whatever the meshes are."""
    page = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)
    halves = {((0, 2), (None, None)): page[:2], ((2, 4), (None, None)): page[2:]}
    np.testing.assert_array_equal(whole(halves, (4, 8)), page)
    assert whole({((None, None), (None, None)): page}, (4, 8)) is page
    for part, content in halves.items():
        np.testing.assert_array_equal(page[slices(part)], content)


def test_what_is_forgotten_is_told():
    kv, store, told = pools("float32"), made(), []
    store.on_drop = lambda replica, key, page: told.append((replica, key, page))
    store.take_out(kv, PagesOut.of([PageMove(0, 5, b"a"), PageMove(0, 6, b"b")]))
    store.drop(PagesDropped.of([(0, b"b"), (0, b"nobody's")]))
    ((replica, key, page),) = told
    assert (replica, key) == (0, b"b") and store.all_of(0) == [b"a"]
    np.testing.assert_array_equal(next(iter(page[0].values())), np.asarray(kv[0])[6])


def test_a_page_of_another_size_is_refused():
    with pytest.raises(ValueError, match="bytes"):
        unpacked(b"123", pools("float32"))
