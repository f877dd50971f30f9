"""A GGUF model with its mmproj file, over HTTP: a chat with images says what transformers says of the checkpoint that both were
made of. Slow: what GGUF holds, tests/models/loading/gguf/test_mmproj.py compares for each projector, number by number."""

import asyncio

import pytest

from serving.boot.startup import start
from serving.engine.api.config import EngineConfig
from serving.frontends.app import create_app
from serving.frontends.openai.batches.runner import call_app
from tests.models import tiny_mmproj, tiny_vision
from tests.models.tiny_mmproj import KINDS
from tests.models.tiny_vision import STEPS, TINY
from tests.serving.media.images import encoded, part, uri
from tests.serving.media.test_images import LARGE, SMALL, turn

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_chat_with_images_over_http(name, tmp_path):
    model, folder = tiny_vision.save(name, tmp_path / "model"), tmp_path / "gguf"
    folder.mkdir()
    tiny_mmproj.write_text(name, tmp_path / "model", folder / "tiny.gguf")
    beside = sorted(KINDS).index(name) % 2 == 0  # else it is named
    eyes = (folder if beside else tmp_path) / "mmproj-tiny-f32.gguf"
    tiny_mmproj.write(name, tmp_path / "model", eyes)
    sizes = {"max_model_len": 160, "max_num_batched_tokens": 32} | TINY[name].engine
    started = start(
        EngineConfig(
            model=str(folder / "tiny.gguf"), tokenizer=str(tmp_path / "model"), mmproj=None if beside else str(eyes),
            dtype="float32", quantization="none", max_num_seqs=2, kv_cache_memory="1MiB", mm_encoder_cache_gb=0.0,
            progress=False, **sizes,
        )
    )  # fmt: skip
    try:
        _, ids, images, _ = turn(10, SMALL, 20, LARGE, 11)
        words = [{"type": "text", "text": f"w{i} "} for i in (10, 20, 11)]
        pictures = [part(uri(encoded(*size, seed=seed))) for seed, size in ((1, SMALL.size), (2, LARGE.size))]
        content = [words[0], pictures[0], words[1], pictures[1], words[2]]
        body = {
            "messages": [{"role": "user", "content": content}], "max_tokens": STEPS, "min_tokens": STEPS, "temperature": 0,
            "return_token_ids": True,
        }  # fmt: skip

        async def ask():
            return await call_app(create_app(started.service(), page=False), "/v1/chat/completions", body, "a")

        status, reply = asyncio.run(ask())
        assert status == 200, reply
        prompt, tokens = tiny_vision.expected(name, model, ids, images)
        assert reply["prompt_token_ids"] == prompt
        assert reply["choices"][0]["token_ids"] == tokens
        started.engine.runner.guard.check()
    finally:
        started.shutdown()
