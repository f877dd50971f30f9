"""Whole weights beside pairs: copies of the base's, a few rows of it, and what cannot be served so."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.adapters.adapter import Base
from models.adapters.peft import read_peft
from tests.models.adapters.make import EMBED, write_adapter
from tests.tiny_checkpoint import VOCAB

EMBED_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
_RNG = np.random.default_rng(0)
TENSORS = {name: _RNG.standard_normal((VOCAB, EMBED)).astype(np.float32) for name in (EMBED_NAME, HEAD_NAME)}
BASE = Base(tuple(TENSORS), 2, (6, 3), None, frozenset({EMBED_NAME}), max_rank=8, read=TENSORS.__getitem__)


def with_tensors(folder, tensors, **config):
    path = folder / "adapter_model.safetensors"
    save_file({**load_file(path), **{f"base_model.model.{name}": value for name, value in tensors.items()}}, path)
    said = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


def moved(values, rows, by=1.0):
    out = values.copy()
    out[list(rows)] += by
    return out


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_copies_of_the_bases_weights_are_accounted_for_and_change_nothing(tmp_path, dtype):
    copies = {
        "model.embed_tokens.base_layer.weight": TENSORS[EMBED_NAME].astype(dtype),
        "lm_head.weight": TENSORS[HEAD_NAME].astype(dtype),
    }
    folder = write_adapter(tmp_path / "a", embedding=True)
    plain = read_peft(folder)
    assert read_peft(with_tensors(folder, copies), base=BASE).digest() == plain.digest()


def test_a_copy_beside_a_pair_may_be_of_a_base_that_was_rounded_otherwise(tmp_path):
    noise = 1 + 0.1 * _RNG.standard_normal((VOCAB, EMBED)).astype(np.float32)
    folder = write_adapter(tmp_path / "a", embedding=True)
    plain = read_peft(folder)
    copy = TENSORS[EMBED_NAME] * noise
    with_tensors(folder, {"model.embed_tokens.base_layer.weight": copy})
    assert read_peft(folder, base=BASE).digest() == plain.digest()
    with_tensors(folder, {"model.embed_tokens.base_layer.weight": moved(copy, [250, 251], 3.0)})
    pair, before = read_peft(folder, base=BASE).pairs[EMBED_NAME], plain.pairs[EMBED_NAME]
    assert pair.rank == before.rank + 2, "tokens that were added in rows that nobody had used"
    change = (pair.b_Or @ pair.a_rI - before.b_Or @ before.a_rI).T
    assert np.flatnonzero(np.abs(change).max(axis=1) > 1e-4).tolist() == [250, 251]


def test_a_few_retrained_rows_are_a_low_rank(tmp_path):
    rows = [3, 77, 200]
    changed = {name: moved(values, rows) for name, values in TENSORS.items()}
    adapter = read_peft(with_tensors(write_adapter(tmp_path / "a"), changed, modules_to_save=["lm_head"]), base=BASE)
    assert adapter.rank == 4 and len(adapter.pairs) == 16 and not adapter.whole
    head, table = adapter.pairs[HEAD_NAME], adapter.pairs[EMBED_NAME]
    np.testing.assert_allclose(TENSORS[HEAD_NAME] + head.b_Or @ head.a_rI, changed[HEAD_NAME], atol=1e-6)
    np.testing.assert_allclose(TENSORS[EMBED_NAME] + (table.b_Or @ table.a_rI).T, changed[EMBED_NAME], atol=1e-6)


def test_rows_of_a_weight_that_the_checkpoint_has_turned_are_its_columns(tmp_path):
    name, stored_IO = "h.0.attn.c_proj.weight", TENSORS[HEAD_NAME][:EMBED]
    base = dataclasses.replace(BASE, tensors=(name,), turned=frozenset({name}), read=lambda _: stored_IO)
    changed_IO = stored_IO.copy()
    changed_IO[:, 5] += 1.0
    folder = with_tensors(write_adapter(tmp_path / "a"), {name: changed_IO})
    pair = read_peft(folder, base=base).pairs[name]
    np.testing.assert_allclose((pair.b_Or @ pair.a_rI).T, changed_IO - stored_IO, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_tokens_that_were_trained_by_themselves(tmp_path, tied):
    ids, rows_kD = [5, 9], np.ones((2, EMBED), np.float32)
    base = dataclasses.replace(BASE, tied=EMBED_NAME if tied else "")
    folder = with_tensors(
        write_adapter(tmp_path / "a"), {"model.embed_tokens.token_adapter.trainable_tokens_delta": rows_kD},
        trainable_token_indices={"embed_tokens": ids},
    )  # fmt: skip
    adapter = read_peft(folder, base=base)
    assert (HEAD_NAME in adapter.pairs) is tied and len(adapter.pairs) == 15 + tied
    table = adapter.pairs[EMBED_NAME]
    np.testing.assert_allclose((TENSORS[EMBED_NAME] + (table.b_Or @ table.a_rI).T)[ids], rows_kD, atol=1e-6)
    for wrong, says in (
        ([5], "names 1 tokens"),
        ([5, VOCAB], "ids from 0"),
        ([5, True], "ids from 0"),
        ([5, 5], "names 1"),
    ):
        with_tensors(folder, {}, trainable_token_indices=wrong)
        with pytest.raises(ValueError, match=says):
            read_peft(folder, base=base)
    with_tensors(folder, {"model.embed_tokens.trainable_tokens_delta": rows_kD[:, :-1].copy()})
    with pytest.raises(ValueError, match="rows of no table"):
        read_peft(folder, base=base)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("lm_head.weight", moved(TENSORS[HEAD_NAME], range(9)), f"in 9 of its {VOCAB} rows; --max-lora-rank is 8"),
        ("lm_head.weight", np.zeros((VOCAB + 8, EMBED), np.float32), "tokens were added"),
        ("lm_head.base_layer.weight", TENSORS[HEAD_NAME][:, :-1].copy(), "another one"),
        ("lm_head.weight", np.full((VOCAB, EMBED), np.nan, np.float32), "not finite"),
        ("model.norm.weight", np.ones(EMBED, np.float32), "1 tensors are no LoRA matrices .model.norm.weight.*Merge"),
        ("model.layers.0.self_attn.q_proj.bias", np.ones(8, np.float32), "q_proj.bias.*Merge"),
    ],
)
def test_what_cannot_be_served_so(tmp_path, name, values, says):
    folder = with_tensors(write_adapter(tmp_path / "a"), {name: values})
    with pytest.raises(ValueError, match=says):
        read_peft(folder, base=BASE)
