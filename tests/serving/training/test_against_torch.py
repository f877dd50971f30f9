"""Losses, gradients and steps against torch and peft."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from models.recipes import given_back
from serving.training.export import write_peft
from serving.training.packing import Rows
from tests.serving.training.tiny import Bench, LoraSettings, Optimizer, examples, make_model, pack

torch = pytest.importorskip("torch")
STEPS, B = 5, 3


def torch_loss(model, batch):
    """The mean loss over a batch of rows that hold one text each, by torch alone."""
    tokens, segments, _, index, target, weight = (torch.from_numpy(x) for x in batch)
    logits = model(input_ids=tokens.long(), attention_mask=(segments > 0).long(), use_cache=False).logits
    picked = torch.take_along_dim(logits, index.long()[..., None], dim=1)
    losses = torch.nn.functional.cross_entropy(
        picked.reshape(-1, picked.shape[-1]).float(), target.long().reshape(-1), reduction="none"
    )
    return (losses * weight.reshape(-1)).sum() / weight.sum()


def order(step: int, rows: Rows) -> np.ndarray:
    return np.random.default_rng(step).permutation(len(rows))[:B]


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", LoraSettings(4, 8.0)),
        ("qwen3", LoraSettings(3, 6.0, rslora=True, targets=("q_proj", "v_proj", "down_proj"))),
    ],
)
def test_lora_step_by_step_as_peft(name, lora, tmp_path):
    import peft

    base = make_model(name, tmp_path / "base")
    rows = pack(examples(8), 40, packing=False)
    ours = Bench(tmp_path / "base", rows, lora, Optimizer(1e-2, "linear", warmup=2, weight_decay=0.01), steps=STEPS)
    write_peft(tmp_path / "start", jax.tree.map(np.asarray, ours.trained), lora, base="tiny")
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "start"), is_trainable=True)
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(learned) == 2 * len(ours.trained)
    adamw = torch.optim.AdamW(learned.values(), lr=1e-2, weight_decay=0.01)
    rises = torch.optim.lr_scheduler.LambdaLR(
        adamw, lambda step: step / 2 if step < 2 else max(0.0, (STEPS - step) / (STEPS - 2))
    )

    def of(pairs, name):
        tensor, part = name.removeprefix("base_model.model.").split(".lora_")
        return np.asarray(pairs[f"{tensor}.weight"][part[0].lower()])

    for step in range(STEPS):
        batch = rows.take(order(step, rows))
        adamw.zero_grad()
        loss = torch_loss(model, batch)
        loss.backward()
        found, our_loss = ours.gradients(order(step, rows))
        assert our_loss == pytest.approx(float(loss), abs=1e-4)
        for n, parameter in learned.items():
            np.testing.assert_allclose(of(found, n), parameter.grad.numpy(), atol=1e-4)
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        adamw.step()
        rises.step()
        ours.step(order(step, rows))
    for n, parameter in learned.items():
        np.testing.assert_allclose(of(ours.trained, n), parameter.detach().numpy(), atol=1e-4)

    # What was learned, by peft from our files.
    write_peft(tmp_path / "end", jax.tree.map(np.asarray, ours.trained), lora, base="tiny")
    fresh = peft.PeftModel.from_pretrained(make_model(name, tmp_path / "base"), str(tmp_path / "end"))
    batch = rows.take(order(0, rows))
    with torch.no_grad():
        assert float(torch_loss(fresh, batch)) == pytest.approx(float(torch_loss(model, batch)), abs=1e-4)
    assert ours.gradients(order(0, rows))[1] == pytest.approx(float(torch_loss(model, batch)), abs=1e-4)


FAMILIES = (
    "gemma3", "gpt-oss", "deepseek v3", "llama4, chunks", "gpt2", "gemma 4, per-layer embeddings, shared pages",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_all_parameters_of_any_family(name, tmp_path):
    model = make_model(name, tmp_path)
    rows = pack(examples(3), 40, packing=False)
    ours = Bench(tmp_path, rows, None)
    found, loss = ours.gradients(np.arange(3))
    expected = torch_loss(model, rows.take(np.arange(3)))
    expected.backward()
    assert loss == pytest.approx(float(expected), abs=1e-4)
    tensors = given_back((ours.recipes[path], np.asarray(g)) for path, g in found.items() if ours.recipes[path].by_rows)
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    same = tensors.keys() & grads.keys()
    assert len(same) > len(tensors) // 3
    for n in same:
        np.testing.assert_allclose(tensors[n], grads[n], atol=1e-4, err_msg=n)
