"""Which layers share pages."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from ops.paged_attention import KVGroups, KVSpec
from ops.paged_attention.groups import MOST_GROUPS, layers_per_page

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
    for spec, (group, array) in zip(specs, groups.places, strict=True):
        assert groups.windows[group] == spec.window and 0 <= array < size


@pytest.mark.parametrize(
    "specs,max_len",
    [
        (layers(None, None), 4096),
        (layers(64, 64), 4096),
        (layers(None, 4096), 4096),  # no sequence is longer than the window
        ([FULL, KVSpec(4, 64, 64, 64)], 4096),  # they do not keep the same
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


def of_two_sizes(heads=1):
    """As Gemma 4 E2B: 28 layers with windows, seven with larger heads that see all."""
    narrow, wide = KVSpec(1, 256, 256, 512), KVSpec(heads, 512, 512)
    return [wide if (i + 1) % 5 == 0 else narrow for i in range(35)]


def test_layers_with_smaller_heads_lie_in_arrays_of_larger_ones():
    specs = of_two_sizes()
    size = layers_per_page(specs, 1 << 17)
    groups = KVGroups.of(specs, size)
    assert (size, Counter(groups.windows)) == (7, {None: 1, 512: 4})
    assert groups.arrays == (KVSpec(1, 512, 512),) * 7


@pytest.mark.parametrize(
    ("specs", "max_len"),
    [
        (of_two_sizes(), 1024),  # twice the numbers in most layers, and windows give back half of their pages
        (of_two_sizes(heads=2), 1 << 17),
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
        KVGroups.of([FULL, KVSpec(4, 64, 64, 64)], 1)
