"""Whole runs on a tiny checkpoint with a tokenizer: what is written, how a run goes on, and what is said when it cannot."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file

from models.adapters.peft import read_peft
from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from serving.training.lora import LoraSettings
from serving.training.record import Line, plot, read
from serving.training.run import finetune
from serving.training.settings import Optimizer, Settings
from tests.models.adapters.make import write_base

FAST = Optimizer(5e-3, warmup=0.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and its data: sentences of which each word tells the next."""
    folder = tmp_path_factory.mktemp("finetune")
    write_base(folder / "base")
    rng = np.random.default_rng(0)
    lines = [
        {"text": " ".join(f"w{(start + 7 * i) % 200 + 10}" for i in range(9))} for start in rng.integers(0, 200, 20)
    ]
    lines += [{"prompt": "w5 w6", "completion": f"w{i} w{i + 1}"} for i in range(20, 24)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def settings(made, out, **fields):
    given = {
        "model": str(made / "base"), "lora": LoraSettings(4, 8.0), "batch": 2, "max_length": 64, "max_steps": 6,
        "optimizer": FAST, "log_every": 2, "dtype": "float32", "eval_share": 0.2,
    }  # fmt: skip
    return Settings((made / "data.jsonl",), made / out, **(given | fields))


@pytest.fixture(scope="module")
def straight(made):
    """A run from its first to its last step."""
    told: list[str] = []
    finished = finetune(settings(made, "straight", eval_every=3), merge="float32", tell=told.append)
    return finished, told


def test_what_a_run_tells_and_writes(made, straight):
    finished, told = straight
    out = made / "straight"
    assert finished.done and finished.step == 6
    assert [line.step for line in finished.lines] == [1, 2, 3, 4, 6]
    assert finished.lines[-1].loss < finished.lines[0].loss
    assert [line.step for line in finished.lines if line.eval_loss is not None] == [3, 6]
    assert "14 matrices" in told[0] and any(line.startswith("step 6/6  loss ") for line in told)
    recorded = read(out / "metrics.csv")
    assert [line.loss for line in recorded] == pytest.approx([line.loss for line in finished.lines], rel=1e-5)
    assert (out / "loss.svg").read_text().count("<polyline") == 2
    assert read_peft(out).rank == 4 and len(read_peft(out).pairs) == 14
    assert (out / "tokenizer.json").exists()


def test_peft_reads_the_adapter_and_the_merged_model_is_base_and_adapter(made, straight):
    torch, peft, transformers = (pytest.importorskip(name) for name in ("torch", "peft", "transformers"))
    base = transformers.AutoModelForCausalLM.from_pretrained(made / "base").eval()
    tokens = torch.arange(10, 40)[None]
    with torch.no_grad():
        plain = base(tokens).logits
        adapted = peft.PeftModel.from_pretrained(base, str(made / "straight")).eval()(tokens).logits
        whole = transformers.AutoModelForCausalLM.from_pretrained(made / "straight" / "merged").eval()(tokens).logits
    assert (plain - adapted).abs().max() > 0.1
    torch.testing.assert_close(whole, adapted, atol=1e-4, rtol=0)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(made, straight):
    first = settings(made, "resumed", eval_every=3)
    asked = iter([False, False, False, True])
    stopped = finetune(first, stop=lambda: next(asked), tell=lambda _: None)
    assert not stopped.done and stopped.step == 4 and not (made / "resumed" / "adapter_config.json").exists()
    again = dataclasses.replace(first, resume=True)
    with pytest.raises(ValueError, match=r"of another run: seed was 0 and is 1"):
        finetune(dataclasses.replace(again, seed=1), tell=lambda _: None)
    finished = finetune(again, tell=lambda _: None)
    assert finished.done and finished.step == 6
    one, other = (load_file(made / name / "adapter_model.safetensors") for name in ("straight", "resumed"))
    for name, values in one.items():
        np.testing.assert_array_equal(other[name], values, err_msg=name)
    losses = {line.step: line.loss for line in straight[0].lines}
    assert {line.step: line.loss for line in finished.lines if line.step in (1, 2, 3, 6)} == pytest.approx(
        {step: losses[step] for step in (1, 2, 3, 6)}, rel=1e-5
    )
    with pytest.raises(ValueError, match="is not empty"):
        finetune(first)
    with pytest.raises(ValueError, match="there is no run to go on with"):
        finetune(settings(made, "nowhere", resume=True))


def test_all_parameters_come_back_as_a_model(made):
    out = made / "full"
    finished = finetune(settings(made, "full", lora=None, max_steps=3, log_every=1), tell=lambda _: None)
    assert finished.lines[-1].loss < finished.lines[0].loss
    before, after = (
        {
            path: np.asarray(p.get_value())
            for path, p in parameters_of(load_model(resolve(str(f)), progress=False).model)
        }
        for f in (made / "base", out)
    )
    assert before.keys() == after.keys()
    assert all(np.abs(after[path] - before[path]).max() > 0 for path in before)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_the_command_line(made):
    command = [sys.executable, "-m", "serving.finetune", "--model", str(made / "base"), "--out", str(made / "cli")]
    bad = subprocess.run([*command, "--data", str(made / "none.jsonl")], capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "none.jsonl cannot be read" in bad.stderr and "Traceback" not in bad.stderr
    full = [*command, "--data", str(made / "data.jsonl"), "--full", "--quantization", "int8"]
    bad = subprocess.run(full, capture_output=True, text=True, check=False)
    assert bad.returncode == 1 and "leave --quantization out" in bad.stderr


def test_the_plot_takes_any_numbers():
    assert "<polyline" not in plot([])
    assert plot([Line(1, 2.5), Line(2, float("inf")), Line(300, 0.01, eval_loss=7.0)]).count("<circle") == 3
