"""What a head has computed of a request, and when it catches up; which of two sources is asked."""

from __future__ import annotations

import itertools

import pytest

from serving.engine.api.sampling_params import SamplingParams
from serving.engine.api.speculative import SpeculativeConfig
from serving.engine.api.types import EngineRequest
from serving.engine.requests.plan import HEARD, ON_DEVICE
from serving.engine.scheduling.drafts.head import LATE, SPARE
from serving.engine.scheduling.drafts.model import MOST_PATIENCE, PATIENCE
from tests.serving.engine.scheduling.drafts.test_planner import DEAR, REPEATS, begin, scheduler
from tests.serving.engine.scheduling.test_ragged import result

MTP = SpeculativeConfig("mtp", num_speculative_tokens=4)
ALWAYS = SpeculativeConfig("mtp", num_speculative_tokens=4, enable_adaptive_verification=False)


def missed(plan) -> list[tuple[int, int]]:
    """[start, end) of what each request's head has missed."""
    return [(chunk.start, chunk.end) for chunk in plan.caught_up]


def test_a_prompt_is_computed_with_the_decoder_and_the_last_position_is_what_it_guesses_from():
    s = scheduler(how=ALWAYS)
    begin(s, [7] * 20, first=1)
    plan = s.schedule(0.0)
    assert plan.drafts == ((ON_DEVICE,) * 4,)
    assert missed(plan) == [(19, 20)], "the hidden states at 19, and the token at 20"
    s.retire(plan, result((2, 3, 9)), 0.0)  # two accepted: of three new tokens the positions before the last
    assert missed(s.schedule(0.0)) == [(20, 23)], "its own guesses are computed anew"


def test_it_catches_up_before_it_is_too_late_and_keeps_count_of_how_long_it_was_not_asked():
    s = scheduler(DEAR, MTP)  # drafts never pay
    s.add(EngineRequest("r0", (7,) * 10, SamplingParams(max_tokens=80)))
    s.retire(s.schedule(0.0), result((1,)), 0.0)
    guesses = s.drafts._guesses(s.requests["r0"])
    late = []
    for i in range(60):
        plan = s.schedule(0.0)
        assert plan.drafts == ()
        late += missed(plan)
        s.retire(plan, result((i,)), 0.0)
    assert [end - start for start, end in late] == [LATE + 1] * len(late) and len(late) == 60 // (LATE + 1)
    assert all(b[0] == a[1] for a, b in itertools.pairwise(late))
    assert guesses._last_asked == 10, "to catch up is not to be asked"
    assert guesses.missed <= LATE + 1


def test_who_is_too_late_is_not_asked():
    s = scheduler(how=ALWAYS)
    begin(s, [7] * 20, first=1)
    guesses = s.drafts._guesses(s.requests["r0"])
    most = s.drafts.source.most_missed
    assert most <= HEARD - 4 - SPARE
    s.requests["r0"].tokens += [1] * 60
    guesses.computed = 81 - 1 - most
    assert guesses.guess(4)[0] == [ON_DEVICE] * 4
    guesses.computed -= 1
    assert guesses.guess(4) == ([], [])


def test_patience_grows_while_all_is_wrong():
    s = scheduler(how=ALWAYS)
    begin(s, [7] * 20, first=1)
    guesses = s.drafts._guesses(s.requests["r0"])
    for _ in range(8):
        guesses.verified(4, 0)
    assert guesses._patience == MOST_PATIENCE
    assert guesses.guess(4)[1][0] < 0.4
    guesses.verified(4, 1)
    assert guesses._patience == PATIENCE


@pytest.mark.parametrize("repeats", [True, False])
def test_auto_asks_a_head_where_nothing_was_found(repeats):
    how = SpeculativeConfig("auto", num_speculative_tokens=4, enable_adaptive_verification=False)
    s = scheduler(how=how, has_head=True)
    begin(s, REPEATS if repeats else list(range(20, 44)), first=1)
    for matched in range(30):
        for _ in range(50):
            s.drafts.source.rates.count(matched, True)
    plan = s.schedule(0.0)
    assert plan.drafts == ((2, 3, 4, 5) if repeats else (ON_DEVICE,) * 4,)
    assert bool(plan.caught_up) is not repeats and plan.has_drafted(0) is not repeats
    s.retire(plan, result((2, 3, 9) if repeats else (8,)), 0.0)
