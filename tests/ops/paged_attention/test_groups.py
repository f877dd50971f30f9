"""Which layers share pages."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from ops.paged_attention import KVGroups, KVSpec
from ops.paged_attention.groups import MOST_GROUPS, layers_per_page
from ops.paged_attention.pages import bytes_per_page
from serving.engine.cache.kv_windows import pages_of

FULL = KVSpec(2, 64, 64)


def layers(*windows):
    return [dataclasses.replace(FULL, window=w) for w in windows]


def every(count, step, window):
    """`count` layers of which every `step`-th sees all."""
    return layers(*(None if (i + 1) % step == 0 else window for i in range(count)))


@pytest.mark.parametrize(
    "specs,size,kinds",
    [
        (every(18, 6, 512), 3, {None: 1, 512: 5}),  # Gemma 3 270M
        (every(26, 6, 512), 4, {None: 1, 512: 6}),  # 1B: the last group of windows has two layers
        (every(34, 6, 1024), 5, {None: 1, 1024: 6}),  # 4B
        (every(48, 6, 1024), 8, {None: 1, 1024: 5}),  # 12B
        (every(62, 6, 1024), 10, {None: 1, 1024: 6}),  # 27B
        (every(26, 2, 4096), 13, {None: 1, 4096: 1}),  # Gemma 2 2B
        (every(24, 2, 128), 12, {None: 1, 128: 1}),  # GPT-OSS 20B
        (every(48, 4, 8192), 12, {None: 1, 8192: 3}),  # Llama 4 Scout
        (layers(None, *(100,) * 39), 3, {None: 1, 100: 13}),  # not 1, which makes 40 groups
        (layers(64, 64, 256, 256, 256), 1, {64: 2, 256: 3}),
    ],
)
def test_few_groups_and_little_waste(specs, size, kinds):
    assert layers_per_page(specs, 1 << 17) == size
    groups = KVGroups.of(specs, size)
    assert Counter(groups.windows) == kinds and len(groups.windows) <= MOST_GROUPS
    assert groups.arrays == (FULL,) * size
    assert len(set(groups.places)) == len(specs), "two layers have the same part of a page"
    for spec, (group, array, _) in zip(specs, groups.places, strict=True):
        assert groups.windows[group] == spec.window and 0 <= array < size


@pytest.mark.parametrize(
    "specs,max_len",
    [
        (layers(None, None), 4096),
        (layers(64, 64), 4096),
        (layers(None, 4096), 4096),  # no sequence is longer than the window
        ([FULL, KVSpec(3, 64, 64, 64)], 4096),  # what they keep does not fit together
    ],
)
def test_one_group_where_nothing_is_gained(specs, max_len):
    size = layers_per_page(specs, max_len)
    assert size == len(specs)
    groups = KVGroups.of(specs, size)
    assert groups == KVGroups.of(specs) and groups.places is None and groups.arrays == tuple(specs)


def test_no_groups_where_no_layer_keeps_anything_of_a_position():
    """As in Mamba."""
    assert KVGroups.of([], layers_per_page([], 4096)) == KVGroups((), (), ())


GEMMA4 = {  # (layers with windows, their heads), (layers that see all, theirs), window
    "E2B": ((12, 1, 256), (3, 1, 512), 512),
    "E4B": ((20, 2, 256), (4, 2, 512), 512),
    "26B-A4B": ((25, 8, 256), (5, 2, 512), 1024),
    "31B": ((50, 16, 256), (10, 4, 512), 1024),
}
"""As published; of the E models the layers with pages of their own."""


def gemma4(name, mesh=1):
    """What its layers keep where heads are cut over `mesh` devices, of which each has one at least."""
    (narrow, *few), (wide, *many), window = GEMMA4[name]
    period = narrow // wide + 1

    def spec(heads, size, window):
        heads = max(heads, mesh)
        return KVSpec(heads, size, size, window)

    return [spec(*many, None) if (i + 1) % period == 0 else spec(*few, window) for i in range(narrow + wide)]


@pytest.mark.parametrize(
    ("name", "mesh", "size", "kinds", "parts"),
    [
        ("E2B", 1, 3, {None: 1, 512: 2}, {256: 2, 512: 1}),
        ("E2B", 4, 3, {None: 1, 512: 2}, {256: 2, 512: 1}),
        ("E4B", 1, 4, {None: 1, 512: 3}, {256: 2, 512: 1}),
        ("26B-A4B", 1, 3, {None: 1, 1024: 9}, {256: 1, 512: 2}),
        ("26B-A4B", 4, 5, {None: 1, 1024: 5}, {256: 1, 512: 1}),
        ("31B", 1, 5, {None: 1, 1024: 10}, {256: 1, 512: 2}),
        ("31B", 8, 10, {None: 1, 1024: 5}, {256: 1, 512: 1}),
    ],
)
def test_kinds_of_layers_share_arrays(name, mesh, size, kinds, parts):
    specs = gemma4(name, mesh)
    assert layers_per_page(specs, 1 << 17) == size
    groups = KVGroups.of(specs, size)
    assert Counter(groups.windows) == kinds and len(groups.arrays) == size
    (array,) = set(groups.arrays)
    assert {kind.head_dim for kind in array.kinds} == {256, 512}
    assert len(set(groups.places)) == len(specs), "two layers have the same part of a page"
    for spec, (group, at, part) in zip(specs, groups.places, strict=True):
        assert groups.windows[group] == spec.window and 0 <= at < size
        assert array.parts_of(spec) == parts[spec.head_dim] and 0 <= part < array.parts_of(spec)


@pytest.mark.parametrize(("name", "share"), [("26B-A4B", 0.16), ("31B", 0.14)])
def test_the_large_gemmas_keep_their_windows(name, share):
    """Bytes of a sequence of 131,072 tokens against those of layers that all keep all."""
    specs, page = gemma4(name), 16
    groups = KVGroups.of(specs, layers_per_page(specs, 1 << 17))
    held = pages_of(1 << 17, groups.windows, page, 1024) * sum(
        bytes_per_page(array, page, "bfloat16") for array in groups.arrays
    )
    assert held < share * (1 << 17) / page * sum(bytes_per_page(spec, page, "bfloat16") for spec in specs)


def test_smaller_heads_that_fill_no_page_are_filled_up():
    specs = [KVSpec(2, 64, 64) if (i + 1) % 5 == 0 else KVSpec(2, 48, 48, 512) for i in range(35)]
    size = layers_per_page(specs, 1 << 17)
    groups = KVGroups.of(specs, size)
    assert (size, Counter(groups.windows)) == (7, {None: 1, 512: 4})
    assert groups.arrays == (KVSpec(2, 64, 64),) * 7 and {part for _, _, part in groups.places} == {0}


@pytest.mark.parametrize(
    ("specs", "max_len"),
    [
        (gemma4("E2B")[:1] * 7 + [KVSpec(1, 512, 512)] * 28, 513),  # windows give nothing back
        ([dataclasses.replace(FULL, window=64), KVSpec(3, 64, 64)], 1 << 17),  # no number of either is the other's
        ([dataclasses.replace(FULL, window=64), dataclasses.replace(FULL, head_dim=128)], 1 << 17),  # V of another size
    ],
)
def test_they_do_not_where_that_takes_more_or_cannot_be(specs, max_len):
    assert layers_per_page(specs, max_len) == len(specs)


def test_one_group_frees_what_no_layer_sees():
    assert KVGroups.of(layers(4, 8, 4)).windows == (8,)
    assert KVGroups.of(layers(4, None)).windows == (None,)


def test_layers_that_keep_different_things_share_nothing():
    with pytest.raises(ValueError, match="cannot share"):
        KVGroups.of([FULL, KVSpec(3, 64, 64, 64)], 1)
