"""Who gives way: the answer is checked against the rule, which is short, for many random situations as well."""

from __future__ import annotations

import random

import pytest

from serving.fleet.room import NoRoomError, Resident, next_turn_end, who_leaves


def resident(name, size, *, gives=None, busy=False, pinned=False, used=0.0, since=0.0):
    return Resident(name, size, size if gives is None else gives, busy, pinned, used, since)


def leaves(need, memory, *residents, now=100.0, turn_s=10.0):
    return who_leaves(need, memory, residents, now=now, turn_s=turn_s)


def test_nobody_goes_while_there_is_room():
    assert leaves(4, 10, resident("a", 6)) == ()


def test_the_one_that_nobody_has_asked_for_the_longest_goes_first_and_no_more_than_needed():
    three = resident("a", 4, used=3), resident("b", 4, used=1), resident("c", 4, used=2)
    assert leaves(3, 12, *three) == ("b",)
    assert leaves(5, 12, *three) == ("b", "c")


def test_pinned_and_sleeping_ones_are_not_asked():
    assert leaves(4, 8, resident("a", 4, pinned=True, used=0), resident("b", 4, used=9)) == ("b",)
    with pytest.raises(NoRoomError) as caught:
        leaves(4, 8, resident("a", 4, pinned=True), resident("b", 2, gives=0))
    assert caught.value.fixed == 6


def test_a_busy_one_goes_only_when_it_has_had_its_turn_and_after_all_idle_ones():
    busy, idle = resident("a", 4, busy=True, since=95), resident("b", 4, used=99)
    assert leaves(4, 8, busy, idle) == ("b",)
    assert leaves(8, 8, busy, idle) is None  # five seconds of ten
    assert next_turn_end([busy, idle], now=100.0, turn_s=10.0) == 5.0
    assert leaves(8, 8, busy, idle, now=105.0) == ("b", "a")
    assert next_turn_end([idle], now=100.0, turn_s=10.0) is None


def test_what_no_going_away_makes_fit_is_refused():
    with pytest.raises(NoRoomError) as caught:
        leaves(11, 10, resident("a", 5))
    assert caught.value.fixed == 0


def test_in_any_situation_those_who_go_make_room_and_none_of_them_is_needless():
    random_ = random.Random(7)
    for _ in range(2000):
        memory = random_.randint(5, 30)
        them, left = [], memory
        for i in range(random_.randint(0, 5)):
            size = random_.randint(1, 8)
            if size > left:
                break
            left -= size
            them.append(
                resident(
                    f"m{i}", size, gives=random_.choice((0, size)), busy=random_.random() < 0.4,
                    pinned=random_.random() < 0.2, used=random_.random(), since=random_.choice((85.0, 99.0)),
                )
            )  # fmt: skip
        need = random_.randint(0, 35)
        may_go = {one.name: one.gives for one in them if one.gives and not one.pinned}
        try:
            gone = leaves(need, memory, *them)
        except NoRoomError:
            assert need > left + sum(may_go.values())
            continue
        if gone is None:
            assert need <= left + sum(may_go.values()) and any(one.busy and one.since == 99.0 for one in them)
            continue
        assert set(gone) <= may_go.keys() and need <= left + sum(may_go[name] for name in gone)
        assert not gone or need > left + sum(may_go[name] for name in gone[:-1])
