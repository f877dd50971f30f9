"""Examples in rows, and rows in steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.training.examples import Example, Pair
from serving.training.packing import Plan, pack, pair_rows


def example(tokens, learned, line=0):
    return Example(np.array(tokens, np.int32), np.array(learned, bool), line)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.booleans(), st.integers(0, 5))
def test_every_text_is_there_once_with_its_targets(lengths, packing, seed):
    texts = [example(range(100 * i, 100 * i + n), np.arange(n) >= n // 2, i) for i, n in enumerate(lengths)]
    rows = pack(texts, 64, packing=packing, seed=seed)
    found, targets = {}, {}
    for n in range(len(rows)):
        assert np.all(np.diff(np.flatnonzero(rows.segments_NS[n])) == 1)
        for segment in range(1, rows.segments_NS[n].max() + 1):
            here = np.flatnonzero(rows.segments_NS[n] == segment)
            tokens = rows.tokens_NS[n, here]
            np.testing.assert_array_equal(rows.positions_NS[n, here], np.arange(len(here)))
            found[int(tokens[0]) // 100] = tokens.tolist()
        for index, target, weight in zip(rows.index_NM[n], rows.target_NM[n], rows.weight_NM[n], strict=True):
            if weight:
                assert rows.tokens_NS[n, index] + 1 == target == rows.tokens_NS[n, index + 1]
                targets.setdefault(int(target) // 100, []).append(int(target))
    assert found == {i: text.tokens_N.tolist() for i, text in enumerate(texts)}
    for i, text in enumerate(texts):
        assert sorted(targets[i]) == text.tokens_N[1:][text.learned_N[1:]].tolist()
    assert rows.num_tokens == sum(lengths)
    if packing:
        assert len(rows) <= -(-2 * sum(lengths) // 64) + 1
    else:
        assert len(rows) == len(texts) and not rows.packed


def test_long_texts_are_cut_and_those_without_targets_left_out(caplog):
    rows = pack([example(range(40), np.arange(40) >= 35, 1), example(range(40), np.arange(40) >= 5, 2)], 16)
    assert len(rows) == 1 and rows.tokens_NS.shape == (1, 16) and rows.num_targets == 11
    assert "2 of 2 examples are longer" in caplog.text and "1 examples have nothing to learn" in caplog.text
    with pytest.raises(ValueError, match="nothing to learn"):
        pack([example([1, 2], [False, False])], 16)


def test_steps_go_through_all_rows_once_an_epoch_in_another_order_each_time():
    plan = Plan(rows=11, batch=2, accumulate=2, seed=3)
    assert plan.steps_an_epoch == 3
    orders = []
    for epoch in range(2):
        calls = [call for step in range(3) for call in plan.calls(3 * epoch + step)]
        assert all(len(call) == 2 for call in calls)
        rows = [int(row) for call in calls for row in call if row >= 0]
        assert sorted(rows) == list(range(11))
        orders.append(rows)
    assert orders[0] != orders[1]
    assert [c.tolist() for c in Plan(11, 2, 2, 3).calls(4)] == [c.tolist() for c in plan.calls(4)]


def test_empty_rows_teach_nothing():
    rows = pack([example([1, 2, 3], [False, True, True])], 16)
    batch = rows.take(np.array([0, -1]))
    assert batch[0].shape == (2, 16) and not batch[0][1].any() and batch[5][1].sum() == 0 and batch[5][0].sum() == 2


def test_pairs_keep_what_ends_them():
    rows = pair_rows([Pair((1, 2, 3, 9), (4, 9), None, 1), Pair((*range(30), 9), (5, 9), None, 2)], 20)
    assert rows.tokens_NkS.shape == (2, 2, 32) and rows.length_Nk.tolist() == [[4, 2], [20, 2]]
    assert rows.tokens_NkS[1, 0, 19] == 9 and rows.tokens_NkS[1, 0, 20:].sum() == 0
    tokens, length = rows.take(np.array([1, -1]))
    assert length.tolist() == [[20, 2], [0, 0]] and tokens.dtype == np.int32
