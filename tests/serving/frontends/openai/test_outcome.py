"""What replies say of a request's tokens."""

from __future__ import annotations

from serving.frontends.openai.outcome import usage_dict
from serving.service.replies.outputs import TextOutput, Usage


def test_usage_tells_of_drafts_where_some_were_verified():
    usages = [Usage(), Usage()]
    for usage, accepted in zip(usages, (3, 4), strict=True):
        usage.add(TextOutput(0, token_ids=(5, 6), num_prompt_tokens=7))
        usage.add(TextOutput(0, token_ids=(8,), num_prompt_tokens=7, accepted_drafts=accepted, rejected_drafts=1))
    told = usage_dict(usages)
    assert told["completion_tokens"] == 6 and told["prompt_tokens"] == 14
    details = {"reasoning_tokens": 0, "accepted_prediction_tokens": 7, "rejected_prediction_tokens": 2}
    assert told["completion_tokens_details"] == details
    assert usage_dict([Usage(completion_tokens=3)])["completion_tokens_details"] == {"reasoning_tokens": 0}
