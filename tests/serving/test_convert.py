import json
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import models as tokenizer_models

from models.loading.load import load_model, resolve
from models.parameters import parameters_of
from serving.convert import convert
from serving.models import rows
from serving.text.tokenizer import Tokenizer
from serving.text.tokenizer_saving import write_tokenizer
from tests.models.loading.test_load import HF, tensors


@pytest.fixture
def checkpoint(tmp_path):
    from safetensors.numpy import save_file

    folder = tmp_path / "tiny"
    folder.mkdir()
    save_file(tensors(np.random.default_rng(1)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(HF))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_converted_is_the_same_model(checkpoint, tmp_path):
    convert(str(checkpoint), tmp_path / "out", dtype="float32", mesh="model=1")
    before = load_model(resolve(str(checkpoint)), progress=False)
    after = load_model(resolve(str(tmp_path / "out")), progress=False)
    assert (after.model_id, after.config, after.source.kind) == ("tiny", before.config, "orbax")
    for (path, ours), (_, theirs) in zip(parameters_of(after.model), parameters_of(before.model), strict=True):
        np.testing.assert_array_equal(np.asarray(ours[...]), np.asarray(theirs[...]), err_msg=path)
    with pytest.raises(ValueError, match="exists already"):
        convert(str(checkpoint), tmp_path / "out")


def test_tokenizer_files_of_a_gguf(tmp_path):
    hf = tokenizers.Tokenizer(tokenizer_models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    hf.add_special_tokens(["<s>", "</s>"])
    templates = {"default": "{{ messages }}"}
    write_tokenizer(Tokenizer(hf, eos_token_ids=[2], bos_token="<s>", chat_templates=templates), tmp_path)
    again = Tokenizer.from_directory(tmp_path)
    assert again.eos_token_ids == (2,)
    assert again.bos_token == "<s>"
    assert again.chat_templates == templates


def test_mistakes_are_told_without_a_stack_trace(tmp_path):
    command = [sys.executable, "-m", "serving.convert", "--model", "no/such/thing.gguf", "--out", str(tmp_path / "x")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr


def test_list_of_models():
    listed = {name: row["name"] for row in rows() for name in row["architectures"]}
    assert listed["LlamaForCausalLM"].startswith("Llama")
    assert {"Gemma3ForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"} <= listed.keys()
