"""What int8 weights, and the bfloat16 pages that go with them, cost in quality on the default model.

The text is held out: a licence, a document, code.
"""

from __future__ import annotations

import importlib.util
import pathlib

import pytest

from models.loading.gguf.file import GGUFFile
from models.loading.load import load_model, resolve
from ops import native
from serving.text.tokenizer import Tokenizer

pytestmark = pytest.mark.real_model

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXTS = ("LICENSE", "docs/design.md", "serving/boot/flags/launch.py")
TOKENS, CONTEXT = 4096, 1024


@pytest.mark.skipif(not native.available(), reason="int8 is a default only where the native kernels are")
def test_int8_perplexity_is_within_one_percent_of_float32(capsys):
    spec = importlib.util.spec_from_file_location("perplexity", ROOT / "scripts" / "perplexity.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    source = resolve(None, progress=False)
    tokenizer = Tokenizer.from_gguf(GGUFFile(source.path).metadata)
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    tokens = tokenizer.encode(text)[:TOKENS]
    found = {}
    for scheme in (None, "int8"):
        model = load_model(source, dtype="float32", quantization=scheme, max_model_len=CONTEXT, progress=False).model
        found[scheme] = script.perplexity(model, tokens, CONTEXT, "bfloat16" if scheme else "float32")
    with capsys.disabled():
        print(
            f"\nperplexity: float32 {found[None]:.3f}, int8 {found['int8']:.3f} ({found['int8'] / found[None] - 1:+.2%})"
        )
    assert found["int8"] < found[None] * 1.01
