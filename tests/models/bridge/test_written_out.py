"""Attention that a model writes out: what is found in recordings of it, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.bridge import stand_ins, written_out
from models.bridge.graph import Refused
from models.bridge.masks import Mask
from models.bridge.record import record

H, W, LENGTHS = 4, 8, (19, 23, 61)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
TABLE = torch.tril(torch.ones(64, 64, dtype=torch.bool))
NEAR = torch.logical_xor(TABLE, torch.tril(TABLE, -16))
LEAST = torch.finfo(torch.float32).min


def recorded(scored, counted=False, length=LENGTHS[-1], fake=None):
    """Attention of states [1, T, W H] with themselves, whose scores [1, H, T, T] `scored` changes."""
    fake = fake or FakeTensorMode(allow_non_fake_inputs=True)

    def attention(tokens, positions, states):
        q = k = v = states.view(1, -1, H, W).transpose(1, 2)
        scores = scored(torch.matmul(q, k.transpose(-1, -2)), states)
        return torch.matmul(torch.nn.functional.softmax(scores, -1), v).transpose(1, 2).reshape(1, -1, H * W)

    with fake:
        tokens = torch.zeros((1, length), dtype=torch.int64)
        inputs = (tokens, tokens.clone(), torch.zeros((1, length, W * H)))
    return record(attention, inputs, {}, fake, (), stand_ins.torch_attention, counted)


def said(scored):
    """What attention over pages is told in place of it."""
    recordings = [recorded(scored, length=length) for length in LENGTHS]
    out = written_out.replaced(recordings)
    (node,) = [node for node in out[-1].nodes if node.op == "jaxserve.attend"]
    assert len({len(one.nodes) for one in out}) == 1
    return json.loads(node.args[4])


def cut(table, scores):
    return table[: scores.shape[-2], : scores.shape[-1]]


def distances(T):
    return torch.arange(1 - T, 1)


FOUND = {
    "our mask, added": (lambda s, x: s * 0.5 + Mask(x), {"scale": 0.5, "window": None}),
    "our mask with a window, as truths": (
        lambda s, x: (s / 4).masked_fill(Mask(x, 16).to(torch.bool), LEAST), {"scale": 0.25, "window": 16},
    ),
    "a table": (lambda s, x: torch.where(cut(TABLE, s), s, LEAST), {"scale": 1.0, "window": None}),
    "a table with a window": (lambda s, x: torch.where(cut(NEAR, s), s, -1e4), {"scale": 1.0, "window": 16}),
    "slopes": (
        lambda s, x: s * 0.5 + Mask(x) + SLOPES * distances(s.shape[-1]),
        {"scale": 0.5, "slopes": [0.5, 0.25, 0.125, 0.0625]},
    ),
    "slopes that are scaled too": (
        lambda s, x: (s + SLOPES * distances(s.shape[-1])) * 0.5 + Mask(x),
        {"scale": 0.5, "slopes": [0.25, 0.125, 0.0625, 0.03125]},
    ),
}  # fmt: skip

REFUSED = {
    "all positions": (lambda s, x: s * 0.5, "sees other positions"),
    "squashed scores": (lambda s, x: torch.tanh(s) * 5 + Mask(x), "something else to the scores"),
    "a bias by the distance squared": (
        lambda s, x: s + Mask(x) + SLOPES * distances(s.shape[-1]) ** 2, "than a multiple of the distance",
    ),
    "a bias of the tokens": (lambda s, x: s + Mask(x) + x[..., :1], "depends on tokens or weights"),
    "every second position": (lambda s, x: s + Mask(x) + LEAST * (distances(s.shape[-1]) % 2), "sees other positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOUND)
def test_what_is_done_to_scores_is_found(case):
    scored, wanted = FOUND[case]
    found = said(scored)
    wanted = {"chunk": None, "softcap": None, "window": None, "slopes": None} | wanted
    assert {name: found[name] for name in wanted if name != "slopes"} == {
        name: value for name, value in wanted.items() if name != "slopes"
    }
    assert found["slopes"] == (None if wanted["slopes"] is None else pytest.approx(wanted["slopes"], rel=1e-5))


@pytest.mark.parametrize("case", REFUSED)
def test_what_pages_cannot_do_is_refused(case):
    scored, why = REFUSED[case]
    with pytest.raises(Refused, match=why):
        said(scored)


def test_whoever_counts_the_tokens_gets_their_positions():
    recording = recorded(lambda s, x: s + Mask(x), counted=True)
    assert not any(node.op == "aten.arange" for node in recording.nodes)
    counting = recorded(lambda s, x: s + Mask(x) + torch.arange(s.shape[-1]), counted=True)
    ops = [node.op for node in counting.nodes]
    assert "aten.arange" not in ops and "aten.squeeze.dims" in ops


def test_a_mask_that_nobody_understands_is_refused():
    """It goes somewhere else than into scores."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)

    def mixed(tokens, positions, states):
        return states + Mask(states)[0, 0, :, :1]

    with fake:
        tokens = torch.zeros((1, 19), dtype=torch.int64)
        inputs = (tokens, tokens.clone(), torch.zeros((1, 19, 8)))
    recording = record(mixed, inputs, {}, fake, (), stand_ins.torch_attention)
    with pytest.raises(Refused, match="change the mask"):
        written_out.replaced([recording])
